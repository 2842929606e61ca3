"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffusion_trainer.objectstore.keys import RESERVED

_TRIES = 16


@dataclass(frozen=True, slots=True)
class Draft:
    """A temporary file in the folder of the file it is to become."""

    path: Path
    file: BinaryIO

    def settle(self) -> None:
        """Bring the content to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


@contextlib.contextmanager
def draft(destination: Path) -> Iterator[Draft]:
    """Yield a temporary file beside `destination`, in folders made where missing; it is removed unless renamed."""
    path, file = _create(destination)
    try:
        with file:
            yield Draft(path, file)
    finally:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems in user space that do not sync folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replaced(destination: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `destination` when the block ends without an error."""
    with draft(destination) as made:
        yield made.file
        made.settle()
        made.path.replace(destination)
    sync_folder(destination.parent)


def _create(destination: Path) -> tuple[Path, BinaryIO]:
    for attempt in range(_TRIES):
        path = destination.parent / f"{RESERVED}tmp-{secrets.token_hex(8)}"
        try:
            _make_folder(destination.parent)
            # Not the tempfile module: its files are 0600 whatever the umask, and other pods may have to read these.
            return path, os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w+b")
        except FileNotFoundError:  # another process deleted the last object of this folder, and the folder with it
            if attempt == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    # mkdir() without parents, so that each new name is brought to the disk by its own folder's fsync.
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
