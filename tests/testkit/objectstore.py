"""Object stores for tests: one in memory, and one that lets a test act before and after every call of another."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from diffusion_trainer.errors import NotFound, PreconditionFailed
from diffusion_trainer.objectstore import Capabilities, ObjectInfo, ObjectStore, open_store

T = TypeVar("T")
When = Literal["before", "after"]
Tap = Callable[[str, str, When], None]
"""Called with the operation, the key, and whether the call is about to be carried out or was; it may raise."""


class Crash(BaseException):
    """The end of the process at this point: nothing catches it, and nothing more is written."""


@dataclass
class Objects:
    """The content of a store in memory, shared by all of its clients."""

    now: float = 1_000_000.0
    content: dict[str, tuple[bytes, float]] = field(default_factory=dict)


class MemoryStore:
    """One client of a store in memory, with the semantics of a bucket."""

    def __init__(self, objects: Objects, *, conditional: bool = True) -> None:
        self._objects = objects
        self._conditional = conditional

    @property
    def uri(self) -> str:
        return "memory:///"

    def get(self, key: str) -> bytes:
        return self.get_with_info(key)[0]

    def get_with_info(self, key: str) -> tuple[bytes, ObjectInfo]:
        try:
            data, modified = self._objects.content[key]
        except KeyError as error:
            raise NotFound(f"get {self.uri}{key}: absent") from error
        return data, ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest(), modified)

    def get_range(self, key: str, *, offset: int, length: int) -> bytes:
        return self.get(key)[offset : offset + length]

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:
        data, info = self.get_with_info(key)
        path.write_bytes(data)
        return info

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> ObjectInfo:
        if self._conditional and if_absent and key in self._objects.content:
            raise PreconditionFailed(f"put {self.uri}{key}: exists")
        if self._conditional and if_match is not None:
            found = hashlib.sha256(self._objects.content[key][0]).hexdigest() if key in self._objects.content else None
            if found != if_match:
                raise PreconditionFailed(f"put {self.uri}{key}: replaced")
        self._objects.content[key] = (bytes(data), self._objects.now)
        return self.head(key)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> ObjectInfo:
        return self.put(key, path.read_bytes(), if_absent=if_absent)

    def head(self, key: str) -> ObjectInfo:
        return self.get_with_info(key)[1]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for key in sorted(self._objects.content, key=str.encode):
            if key.startswith(prefix):
                yield self.head(key)

    def delete(self, key: str) -> None:
        self._objects.content.pop(key, None)

    def capabilities(self) -> Capabilities:
        return Capabilities(create_if_absent=self._conditional, replace_if_match=self._conditional)


class TappedStore:
    """Another store, with a tap before and after each of its calls."""

    def __init__(self, store: ObjectStore, tap: Tap) -> None:
        self._store = store
        self._tap = tap

    @property
    def uri(self) -> str:
        return self._store.uri

    def get(self, key: str) -> bytes:
        return self._tapped("get", key, partial(self._store.get, key))

    def get_with_info(self, key: str) -> tuple[bytes, ObjectInfo]:
        return self._tapped("get", key, partial(self._store.get_with_info, key))

    def get_range(self, key: str, *, offset: int, length: int) -> bytes:
        return self._tapped("get", key, partial(self._store.get_range, key, offset=offset, length=length))

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:
        return self._tapped("get", key, partial(self._store.get_to_file, key, path))

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> ObjectInfo:
        return self._tapped("put", key, partial(self._store.put, key, data, if_absent=if_absent, if_match=if_match))

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> ObjectInfo:
        return self._tapped("put_file", key, partial(self._store.put_file, key, path, if_absent=if_absent))

    def head(self, key: str) -> ObjectInfo:
        return self._tapped("head", key, partial(self._store.head, key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(self._tapped("list", prefix, lambda: tuple(self._store.list(prefix))))

    def delete(self, key: str) -> None:
        self._tapped("delete", key, partial(self._store.delete, key))

    def capabilities(self) -> Capabilities:
        return self._store.capabilities()

    def _tapped(self, operation: str, key: str, action: Callable[[], T]) -> T:
        self._tap(operation, key, "before")
        result = action()
        self._tap(operation, key, "after")
        return result


class CrashAt:
    """A tap that ends the process before or after the call number `call` (from 0), and counts the calls."""

    def __init__(self, call: int | None, when: When = "before") -> None:
        self.calls = 0
        self._call = call
        self._when = when

    def __call__(self, operation: str, key: str, when: When) -> None:
        if when == self._when and self.calls == self._call:
            raise Crash(f"{when} call {self.calls}: {operation} {key}")
        self.calls += when == "after"


def open_held(opener: Callable[[], ObjectStore], *, at: str, reached: Path, release: Path) -> ObjectStore:
    """Open a store that stops before each call whose "operation key" contains `at`, until the test lets it go.

    `reached` and `release` are FIFOs (`os.mkfifo`): the store writes to the first, and reads from the second. With
    `functools.partial` it can be given to another process.
    """

    def hold(operation: str, key: str, when: When) -> None:
        if when == "before" and at in f"{operation} {key}":
            reached.write_text(f"{operation} {key}")
            release.read_text()

    return TappedStore(opener(), hold)


def open_deadly(opener: Callable[[], ObjectStore], *, at: str, when: When) -> ObjectStore:
    """Open a store that kills its process at the call whose "operation key" contains `at`."""

    def kill(operation: str, key: str, moment: When) -> None:
        if when == moment and at in f"{operation} {key}":
            os.kill(os.getpid(), signal.SIGKILL)

    return TappedStore(opener(), kill)


def folder_store(folder: Path) -> Callable[[], ObjectStore]:
    """Return what opens a folder as a store, also in another process."""
    return partial(open_store, folder.as_uri())
