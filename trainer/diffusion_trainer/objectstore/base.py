"""The protocol that every backend of the object store serves, and the values it speaks in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says about one object.

    `key` is relative to the root of the store; `size` is in bytes; `etag` is opaque, changes with the content and is
    what `if_match` takes; `modified` is in seconds since 1970 by the clock of the store.
    """

    key: str
    size: int
    etag: str
    modified: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store was found to do, where stores differ."""

    create_if_absent: bool
    replace_if_match: bool

    @property
    def compare_and_swap(self) -> bool:
        """Return whether two writers can be kept from overwriting each other."""
        return self.create_if_absent and self.replace_if_match


class ObjectStore(Protocol):
    """Objects below one root. Keys are relative to it, segments joined by "/", without a leading or trailing one.

    Safe to use from several threads; not picklable (give another process what `open_store` took). Every method raises
    `diffusion_trainer.errors.StorageError` and nothing of the library behind it: `InvalidKey`, `PermissionDenied`,
    `BucketMissing` and `StorageUnavailable` anywhere, others where they are named. Transient failures are retried
    inside. An object is seen whole or not at all.
    """

    @property
    def uri(self) -> str:
        """Return the URI of the root, ending in "/"; it holds no credentials."""
        ...

    def get(self, key: str) -> bytes:
        """Return the content of an object. Raises `NotFound`."""
        ...

    def get_with_info(self, key: str) -> tuple[bytes, ObjectInfo]:
        """Return the content of an object and the info of exactly that content (for `if_match`). Raises `NotFound`."""
        ...

    def get_range(self, key: str, *, offset: int, length: int) -> bytes:
        """Return at most `length` bytes from `offset` on, fewer (or none) past the end. Raises `NotFound`."""
        ...

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:
        """Write the content to `path` so that it appears whole or not at all (temporary file, fsync, rename).

        The size is verified; an existing file is replaced, never written into. Raises `NotFound`.
        """
        ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> ObjectInfo:
        """Write an object. With `if_absent` only where none is; with `if_match` only over the one with that etag.

        Raises `PreconditionFailed`, and `Conflict` when the store keeps naming a concurrent write.
        """
        ...

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> ObjectInfo:
        """Write an object from a file, in parts and in parallel where it is large. Raises `PreconditionFailed`."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """Return what the store says about an object. Raises `NotFound`."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix` (any string), lazily, in the byte order of the keys."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object; it is no error when there is none."""
        ...

    def capabilities(self) -> Capabilities:
        """Return what the store does; backends that cannot know try it once, with objects that are deleted again."""
        ...
