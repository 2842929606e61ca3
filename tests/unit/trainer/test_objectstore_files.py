"""What only the file backend can get wrong: crashes in the middle, strangers' files, links, modes."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from diffusion_trainer.errors import NotFound, PermissionDenied, StorageUnavailable
from diffusion_trainer.objectstore import file as file_backend
from diffusion_trainer.objectstore.file import FileStore
from testkit.objectstore import Crash


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_crash_in_the_middle_of_a_write_shows_nothing(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str
) -> None:
    store.put("a/key", b"old")

    def die(*_: object, **__: object) -> None:
        raise Crash(point)

    def keep(self: Path, *, missing_ok: bool = False) -> None:
        """As after SIGKILL: the temporary file stays."""

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die)
        patched.setattr(Path, "replace", die)
        patched.setattr(Path, "unlink", keep)
        with pytest.raises(Crash):
            store.put("a/key", b"new")
        with pytest.raises(Crash):
            store.put("a/other", b"new")
    assert len([path for path in (tmp_path / "a").iterdir() if "tmp" in path.name]) == 2
    assert [info.key for info in store.list()] == ["a/key"]
    assert store.get("a/key") == b"old"
    store.put("a/other", b"new", if_absent=True)


def test_etags_of_large_objects_tell_rewrites_apart_without_reading_them(store: FileStore, tmp_path: Path) -> None:
    etags = {store.put("large", bytes(100_000)).etag for _ in range(20)}
    assert len(etags) == 20
    os.truncate(tmp_path / "large", 10 * 2**30)  # sparse; hashing it would take a minute
    assert store.head("large").size == 10 * 2**30


def test_files_laid_by_others_are_objects(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat.png").write_bytes(b"png")
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "dog.png").write_bytes(b"png")
    (tmp_path / "data" / "link.png").symlink_to("cat.png")
    (tmp_path / "data" / "more").symlink_to("../elsewhere")
    (tmp_path / "data" / "up").symlink_to("..")
    (tmp_path / "data" / "dangling").symlink_to("nowhere")
    (tmp_path / "data" / "line\nbreak").write_bytes(b"no key can name it")
    assert [info.key for info in store.list("data/")] == ["data/cat.png", "data/link.png", "data/more/dog.png"]
    assert store.get("data/more/dog.png") == b"png"


def test_files_have_the_mode_that_the_umask_gives(store: FileStore, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        store.put("key", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o640


def test_an_absent_root_is_empty_and_made_by_the_first_write(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "not" / "yet")
    assert list(store.list()) == []
    with pytest.raises(NotFound, match="volume is mounted"):
        store.get("key")
    store.delete("key")
    assert not (tmp_path / "not").exists()
    store.put("key", b"")
    assert [info.key for info in store.list()] == ["key"]


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (13, PermissionDenied, "fsGroup"),
        (30, PermissionDenied, "fsGroup"),
        (28, StorageUnavailable, "larger volume"),
        (5, StorageUnavailable, "check the volume"),
        (116, StorageUnavailable, "check the volume"),
    ],
)
def test_troubles_of_the_volume_are_told_apart(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], remedy: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=remedy) as caught:
        store.put("key", b"data")
    assert "put file://" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_process_forked_under_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with file_backend._locked(tmp_path):
        child = os.fork()
        if child == 0:  # lives until the test is over, with the lock's file open
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    try:
        descriptor = os.open(tmp_path / file_backend._LOCK, os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)
