"""The `file://` backend: a folder as a store, with the same semantics as a bucket.

Writes go to a temporary file in the same folder, are synced, and renamed. Conditional writes compare and rename under a
lock file in that folder (flock: kept by the kernel, gone with its process, honoured across nodes by NFS). Objects and
temporary files are told apart by a reserved prefix. Programs that write below the root by other means are tolerated
for reading; their writes take part in no condition.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from diffusion_trainer.errors import (
    InvalidKey,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from diffusion_trainer.objectstore.atomic import Draft, draft, replaced, sync_folder
from diffusion_trainer.objectstore.base import Capabilities, ObjectInfo
from diffusion_trainer.objectstore.keys import RESERVED, check_key, check_prefix

_LOCK = f"{RESERVED}lock"
# Up to this size the etag is a hash of the content, which compare-and-swap needs: HEAD.json is a few KiB. Above it is
# the file's identity (inode, time, size), so that listing a dataset does not read it.
_HASHED_BYTES = 64 * 1024
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class FileStore:
    """`ObjectStore` over a folder of a file system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def uri(self) -> str:  # noqa: D102 - the protocol says it; likewise below
        return self._root.as_uri().rstrip("/") + "/"

    def get(self, key: str) -> bytes:  # noqa: D102
        return self.get_with_info(key)[0]

    def get_with_info(self, key: str) -> tuple[bytes, ObjectInfo]:  # noqa: D102
        with self._reading("get", key) as file:
            data = file.read()
            return data, _info(key, file, data)

    def get_range(self, key: str, *, offset: int, length: int) -> bytes:  # noqa: D102
        if offset < 0 or length < 0:
            raise ValueError(f"get_range: offset {offset} and length {length} must not be negative")
        with self._reading("get_range", key) as file:
            file.seek(offset)
            return file.read(length)

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:  # noqa: D102
        with self._reading("get_to_file", key) as source, replaced(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
            info = _info(key, source)
            if target.tell() != info.size:
                raise StorageUnavailable(
                    f"get_to_file {self.uri}{key}: {target.tell()} of {info.size} bytes were read; "
                    "something else is writing this file: try again when it is complete"
                )
            return info

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> ObjectInfo:  # noqa: D102
        if if_absent and if_match is not None:
            raise ValueError("put: if_absent and if_match exclude each other")
        return self._write("put", key, lambda file: file.write(data), _condition(if_absent, if_match))

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> ObjectInfo:  # noqa: D102
        with path.open("rb") as source:

            def fill(target: BinaryIO) -> None:
                shutil.copyfileobj(source, target, 1 << 20)

            return self._write("put_file", key, fill, _condition(if_absent, None))

    def head(self, key: str) -> ObjectInfo:  # noqa: D102
        with self._reading("head", key) as file:
            return _info(key, file)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:  # noqa: D102
        check_prefix(prefix, where=self.uri)
        folder, _, start = prefix.rpartition("/")
        return self._walk(folder, start, _identities_above(self._root / folder))

    def delete(self, key: str) -> None:  # noqa: D102
        path = self._path(key)
        try:
            with self._errors("delete", key, writing=True), _locked(path.parent):
                path.unlink()
                sync_folder(path.parent)
        except NotFound:
            return
        except InvalidKey:  # a folder, or below an object: no object has this key
            return
        self._prune(path.parent)

    def capabilities(self) -> Capabilities:  # noqa: D102
        return Capabilities(create_if_absent=True, replace_if_match=True)

    def _path(self, key: str) -> Path:
        check_key(key, where=self.uri)
        return self._root / key

    @contextlib.contextmanager
    def _reading(self, operation: str, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        with self._errors(operation, key, writing=False), path.open("rb") as file:
            yield file

    def _write(
        self, operation: str, key: str, fill: Callable[[BinaryIO], object], condition: Callable[[Path], str | None]
    ) -> ObjectInfo:
        path = self._path(key)
        with self._errors(operation, key, writing=True), draft(path) as made:
            fill(made.file)
            made.file.flush()  # before the time is set
            now = time.time_ns()  # finer than the kernel's own stamp: it is part of the etag of large objects
            os.utime(made.file.fileno(), ns=(now, now))
            made.settle()
            info = _info(key, made.file)
            with _locked(path.parent):
                lost = condition(path)
                if lost is not None:
                    raise PreconditionFailed(f"{operation} {self.uri}{key}: {lost}; read it again and decide anew")
                _publish(made, path)
        return info

    def _walk(self, folder: str, start: str, above: frozenset[tuple[int, int]]) -> Iterator[ObjectInfo]:
        here = self._root / folder
        with self._errors("list", folder, writing=False):
            try:
                stat = here.stat()
                identity = (stat.st_dev, stat.st_ino)
                if identity in above:  # a symbolic link to a folder above
                    return
                with os.scandir(here) as found:
                    entries = sorted((_ordered(entry), entry.name) for entry in found if _visible(entry.name, start))
            except (FileNotFoundError, NotADirectoryError):
                return
        for order, name in entries:
            key = f"{folder}/{name}" if folder else name
            if order.endswith(b"/"):
                yield from self._walk(key, "", above | {identity})
            else:
                with contextlib.suppress(NotFound, InvalidKey):  # deleted meanwhile, or not a name that a key can have
                    yield self.head(key)

    def _prune(self, folder: Path) -> None:
        """Remove folders that hold no object any more: a bucket has no folders, and a key may take their place."""
        while folder != self._root and self._root in folder.parents:
            try:
                if any(inside.name != _LOCK for inside in folder.iterdir()):
                    return
                with _locked(folder):
                    (folder / _LOCK).unlink()
                    folder.rmdir()
            except OSError:
                return  # in use again; whoever uses it makes what is missing
            folder = folder.parent

    @contextlib.contextmanager
    def _errors(self, operation: str, key: str, *, writing: bool) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._translated(f"{operation} {self.uri}{key}", error, writing=writing) from error

    @staticmethod
    def _translated(what: str, error: OSError, *, writing: bool) -> StorageError:
        path = f" ({error.filename})" if error.filename else ""
        if isinstance(error, FileNotFoundError):
            return NotFound(f"{what}: there is no such file{path}; check the URI, and that the volume is mounted")
        if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
            if writing:
                return InvalidKey(f"{what}: a key cannot lie below another, or be a folder of others{path}; rename it")
            return NotFound(f"{what}: there is no object of this name{path}; check the URI")
        if error.errno in _REFUSED:
            return PermissionDenied(f"{what}: {error.strerror}{path}; check the owner and mode, and the pod's fsGroup")
        if error.errno in _FULL:
            return StorageUnavailable(f"{what}: {error.strerror}{path}; free space or use a larger volume")
        return StorageUnavailable(f"{what}: {error.strerror or error}{path}; check the volume and its node")


def _condition(if_absent: bool, if_match: str | None) -> Callable[[Path], str | None]:
    """Return what says why the condition does not hold, None when it does. Called under the lock."""

    def check(path: Path) -> str | None:
        if if_absent and path.exists():
            return "the object exists already"
        if if_match is not None:
            try:
                with path.open("rb") as file:
                    found = _info("", file).etag
            except FileNotFoundError:
                return "the object does not exist any more"
            if found != if_match:
                return f"the object was replaced (its etag is {found}, not {if_match})"
        return None

    return check


def _publish(made: Draft, path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    made.path.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises FileNotFoundError when the folder is gone."""
    while True:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still(descriptor, folder / _LOCK):
                yield
                return
        finally:
            # Not by closing alone: a process forked meanwhile holds the same open file, and so the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    """Return whether the name still means the open file: who deletes a folder deletes its lock file too."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _identities_above(folder: Path) -> frozenset[tuple[int, int]]:
    """Return what links must not lead back to."""
    found = [parent.stat() for parent in folder.resolve().parents if parent.is_dir()]
    return frozenset((stat.st_dev, stat.st_ino) for stat in found)


def _visible(name: str, start: str) -> bool:
    return name.startswith(start) and not name.startswith(RESERVED)


def _ordered(entry: os.DirEntry[str]) -> bytes:
    """Return what to sort by so that whole keys come in byte order: "a-b" before "a/c"."""
    return os.fsencode(entry.name) + (b"/" if entry.is_dir() else b"")


def _info(key: str, file: BinaryIO, data: bytes | None = None) -> ObjectInfo:
    """Return the info of an open file, at whatever position it is; `data` is its content where known."""
    stat = os.fstat(file.fileno())
    if stat.st_size <= _HASHED_BYTES:
        content = os.pread(file.fileno(), _HASHED_BYTES + 1, 0) if data is None else data
        etag = hashlib.sha256(content).hexdigest()
    else:
        etag = f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"
    return ObjectInfo(key=key, size=stat.st_size, etag=etag, modified=stat.st_mtime)
