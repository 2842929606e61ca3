"""Shards: safetensors files that carry the hash of their own content, and the way from the bucket to this machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffusion_api import names
from diffusion_trainer import tensorfile
from diffusion_trainer.errors import NotFound, PreconditionFailed
from diffusion_trainer.objectstore import ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one file must contain: tensors named by `entries`. `kind` is its folder."""

    kind: str
    key: str
    entries: frozenset[str]

    @property
    def name(self) -> str:
        """Return the path of the file below the cache's folder."""
        return f"{self.kind}/{self.key}.safetensors"


class Shelf:
    """The shards of one output destination, and their copies below a local folder."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self._store = store
        self._folder = folder

    def path(self, shard: Shard) -> Path:
        """Return where the shard lies on this machine once it is there."""
        return self._folder / shard.name

    def obtain(self, shard: Shard, make: Callable[[], Mapping[str, torch.Tensor]]) -> bool:
        """See that the shard is on this machine, whole; return whether `make` had to be called.

        Where two attempts make the same shard, the one that is in the bucket first is used by both: another GPU rounds
        differently, and a resumed run must see the numbers that it saw before.
        """
        path = self.path(shard)
        if path.exists():
            if is_whole(path, shard):
                return False
            log.warning("cache: %s on this machine is damaged; fetching it again", shard.name)
        damaged = False
        if self._fetched(shard):
            if is_whole(path, shard):
                return False
            log.warning("cache: %s in the bucket is damaged; building it again", shard.name)
            damaged = True
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_bytes(sealed(make(), shard))
        try:
            self._store.put_file(_object(shard), draft, if_absent=not damaged)
        except PreconditionFailed:
            if self._fetched(shard) and is_whole(path, shard):
                draft.unlink()
                return True
            self._store.put_file(_object(shard), draft)
        draft.replace(path)
        return True

    def _fetched(self, shard: Shard) -> bool:
        path = self.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._store.get_to_file(_object(shard), path)
        except NotFound:
            return False
        return True


def sealed(tensors: Mapping[str, torch.Tensor], shard: Shard) -> bytes:
    """Return the file of a shard; equal tensors give equal bytes."""
    if set(tensors) != shard.entries:
        raise ValueError(f"cache: a shard of {len(shard.entries)} entries was made with {len(tensors)} others")
    return tensorfile.encode(tensors, {"sha256": _digest(tensors), "shard": shard.key})


def is_whole(path: Path, shard: Shard) -> bool:
    """Return whether a file holds the shard's entries, bit for bit as they were sealed."""
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != shard.entries:
                return False
            content = {name: file.get_tensor(name) for name in shard.entries}
            return bool((file.metadata() or {}).get("sha256") == _digest(content))
    except (SafetensorError, OSError, ValueError):
        return False


def _object(shard: Shard) -> str:
    return names.CACHE_PREFIX + shard.name


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensorfile.raw(tensor))
    return digest.hexdigest()
