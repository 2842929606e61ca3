"""From the store back to a snapshot, with everything verified on the way."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_trainer.checkpoint.head import MANIFEST_NAME, Entry
from diffusion_trainer.checkpoint.manifest import File, Manifest, decode_manifest, sha256_of
from diffusion_trainer.checkpoint.snapshot import STATE_NAME, Snapshot
from diffusion_trainer.errors import CheckpointCorrupt, NotFound
from diffusion_trainer.objectstore import ObjectStore

if TYPE_CHECKING:
    import torch


def read_entry(store: ObjectStore, entry: Entry, *, scratch: Path | None) -> Snapshot:
    """Return the snapshot of an entry of the history; its tensors take disk, not memory, until they are written to.

    `scratch` is a folder with room for the files (None: the system's temporary folder).

    Raises:
        CheckpointCorrupt: something of it is absent, or not what was published.
        StorageError: the store could not answer.

    """
    manifest = _manifest(store, entry)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=scratch) as folder:
        paths = {file.key: _verified(store, entry, file, Path(folder)) for file in manifest.files}
        if STATE_NAME not in paths:
            raise _damaged(store, entry, f"it has no {STATE_NAME}")
        scalars = json.loads(paths.pop(STATE_NAME).read_bytes())
        tensors = {name.removesuffix(".safetensors"): _tensors(path) for name, path in paths.items()}
    return Snapshot(step=manifest.step, tensors=tensors, scalars=scalars)


def _manifest(store: ObjectStore, entry: Entry) -> Manifest:
    key = f"{entry.key}/{MANIFEST_NAME}"
    try:
        data = store.get(key)
    except NotFound as error:
        raise _damaged(store, entry, f"{MANIFEST_NAME} is absent") from error
    if hashlib.sha256(data).hexdigest() != entry.manifest_sha256:
        raise _damaged(store, entry, f"{MANIFEST_NAME} is not the one that was published")
    return decode_manifest(data, where=store.uri + key)


def _verified(store: ObjectStore, entry: Entry, file: File, folder: Path) -> Path:
    path = folder / file.key
    try:
        info = store.get_to_file(f"{entry.key}/{file.key}", path)
    except NotFound as error:
        raise _damaged(store, entry, f"{file.key} is absent") from error
    if info.size != file.size:
        raise _damaged(store, entry, f"{file.key} has {info.size} bytes, not {file.size}")
    found = sha256_of(path)
    if found != file.sha256:
        raise _damaged(store, entry, f"{file.key} hashes to {found[:12]}..., not {file.sha256[:12]}...")
    return path


def _damaged(store: ObjectStore, entry: Entry, what: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        f"checkpoint {store.uri}{entry.key} (step {entry.step}) is damaged: {what}; use an older checkpoint, and find "
        "out what else writes or deletes below this prefix"
    )


def _tensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors import safe_open

    # Views of the file's mapping, which outlives its name: no copy in memory, where a whole snapshot may not fit beside
    # what it is read into. The mapping is private: writing to a tensor changes nothing but that tensor.
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
