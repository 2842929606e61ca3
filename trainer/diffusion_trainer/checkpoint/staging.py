"""The folder in which the trainer lays a snapshot for the uploader."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffusion_trainer.checkpoint.layout import MappedFile, layout_of
from diffusion_trainer.checkpoint.snapshot import STATE_NAME, Snapshot, encode_scalars, file_of

_LOCK = "in-use"


class Staging:
    """One slot for one snapshot. Its files are reused as long as the tensors keep their names, shapes and dtypes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: dict[str, MappedFile] = {}

    def stage(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Copy a snapshot into the slot and return the names of its files. The caller may change its tensors then.

        Nothing may be reading the slot. Raises TypeError for what a checkpoint cannot hold, `StorageUnavailable` when
        the volume is full.
        """
        state = encode_scalars(snapshot.scalars)
        layouts = {group: layout_of(group, tensors) for group, tensors in snapshot.tensors.items()}
        for group in self._mapped.keys() - layouts.keys():
            self._mapped.pop(group).remove()
        for group, layout in layouts.items():
            mapped = self._mapped.get(group)
            if mapped is None or mapped.layout.header != layout.header:
                if mapped is not None:
                    self._mapped.pop(group).remove()
                mapped = self._mapped[group] = MappedFile(self.folder / file_of(group), layout)
            mapped.fill(snapshot.tensors[group])
        _finish_copies()
        # The old file may be open for reading still; like all files here it is replaced, not written into.
        (self.folder / STATE_NAME).unlink(missing_ok=True)
        (self.folder / STATE_NAME).write_bytes(state)
        return (*(file_of(group) for group in layouts), STATE_NAME)

    def remove(self) -> None:
        """Delete the files of the slot."""
        for group in list(self._mapped):
            self._mapped.pop(group).remove()
        (self.folder / STATE_NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(parent: Path) -> Iterator[Path]:
    """Yield a folder of one's own below `parent`, and first remove those whose owners died (they hold whole models)."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / "claim").open("w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        for left in parent.glob("snapshot-*"):
            _remove_if_abandoned(left)
        folder = parent / f"snapshot-{secrets.token_hex(6)}"
        folder.mkdir()
        using = contextlib.ExitStack()
        using.enter_context(in_use(folder))
    try:
        yield folder
    finally:
        using.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep others from taking the folder for abandoned; the kernel ends it with the process."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _remove_if_abandoned(folder: Path) -> None:
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)


def _finish_copies() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
