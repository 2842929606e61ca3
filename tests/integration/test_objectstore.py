"""One conformance suite for every backend of the object store, the S3 one against a real server."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from diffusion_trainer.errors import (
    BucketMissing,
    InvalidKey,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from diffusion_trainer.objectstore import Credentials, ObjectStore, join_uri, open_store
from diffusion_trainer.objectstore.settings import MIB, TransferSettings
from testkit.s3 import S3Credentials, S3Server, refused_endpoint

SMALL_PARTS = TransferSettings(part_bytes=5 * MIB, multipart_bytes=5 * MIB, parallel=3)
IMPATIENT = TransferSettings(retries=0, connect_timeout_seconds=1)
WRITERS = 16


def folder_of(keys: S3Credentials, folder: Path, **changed: str) -> Credentials:
    """Lay the files that a projected Secret lays."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "AWS_ACCESS_KEY_ID": keys.access_key_id,
        "AWS_SECRET_ACCESS_KEY": keys.secret_access_key,
        "AWS_REGION": keys.region,
        "AWS_ENDPOINT_URL": keys.endpoint_url,
    }
    for name, value in (values | changed).items():
        (folder / name).write_text(value + "\n")
    return Credentials.from_folder(folder)


@dataclass(frozen=True)
class Server:
    credentials: Credentials
    keys: S3Credentials


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with S3Server(buckets=["conformance"]) as running:
        yield Server(folder_of(running.credentials, tmp_path_factory.mktemp("secret")), running.credentials)


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], ObjectStore]:
    """Return what opens the same empty store, each time as another client."""
    if request.param == "file":
        return partial(open_store, (tmp_path / "store").as_uri())
    running: Server = request.getfixturevalue("server")
    uri = join_uri("s3://conformance", hashlib.sha256(request.node.name.encode()).hexdigest()[:16])
    return partial(open_store, uri, credentials=running.credentials, settings=SMALL_PARTS)


@pytest.fixture
def store(root: Callable[[], ObjectStore]) -> ObjectStore:
    return root()


def content(size: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(1024)) * (size // 1024) + b"x" * (size % 1024)


SIZES = [0, 1, 1023, 70_000, 5 * MIB, 5 * MIB + 1, 11 * MIB + 17]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_put_comes_back(store: ObjectStore, tmp_path: Path, size: int) -> None:
    data = content(size)
    put = store.put("a/object", data)
    assert store.get("a/object") == data
    got, info = store.get_with_info("a/object")
    assert (got, info.size, info.etag, info.key) == (data, size, put.etag, "a/object")
    assert store.head("a/object") == info
    store.get_to_file("a/object", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == data
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_put_from_a_file_comes_back(store: ObjectStore, tmp_path: Path, size: int) -> None:
    data = content(size)
    (tmp_path / "source").write_bytes(data)
    put = store.put_file("a/object", tmp_path / "source")
    assert (put.key, put.size) == ("a/object", size)
    assert store.get("a/object") == data
    assert store.head("a/object").etag == put.etag


def test_overwriting_changes_etag_and_content(store: ObjectStore) -> None:
    first = store.put("key", b"one")
    second = store.put("key", b"two")
    assert first.etag != second.etag
    assert store.get("key") == b"two"


def test_ranges_are_like_slices(store: ObjectStore) -> None:
    store.put("key", b"0123456789")
    assert store.get_range("key", offset=0, length=4) == b"0123"
    assert store.get_range("key", offset=8, length=10) == b"89"
    assert store.get_range("key", offset=10, length=1) == b""
    assert store.get_range("key", offset=99, length=1) == b""
    assert store.get_range("key", offset=3, length=0) == b""
    with pytest.raises(ValueError, match="negative"):
        store.get_range("key", offset=-1, length=1)


@pytest.mark.parametrize("key", ["ünï/çødé", "日本/語 .txt", "with space/a+b&c=d%20?#", "~!@$()*,;:'\"<>|"])
def test_keys_may_hold_any_printable_character(store: ObjectStore, key: str) -> None:
    store.put(key, b"data")
    assert store.get(key) == b"data"
    assert [found.key for found in store.list()] == [key]
    store.delete(key)
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/./b", "a\nb", "a\x00b", ".objectstore-x", "k" * 256]
)
def test_keys_that_some_backend_cannot_hold_are_refused_by_all(store: ObjectStore, key: str) -> None:
    for action in (store.get, store.head, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(InvalidKey, match="use segments of printable characters"):
            action(key)


def test_absence_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
    store.put("there/object", b"")
    for action in (store.get, store.head, store.get_with_info, lambda k: store.get_to_file(k, tmp_path / "copy")):
        for key in ("absent", "there", "there/absent", "there/object/below"):
            with pytest.raises(NotFound, match=key):
                action(key)
    assert not (tmp_path / "copy").exists()
    with pytest.raises(NotFound):
        store.get_range("absent", offset=0, length=1)


def test_delete_is_idempotent_and_leaves_no_trace(store: ObjectStore) -> None:
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete("a/b/c")
    store.delete("a/b/c")
    store.delete("never/was")
    assert [found.key for found in store.list()] == ["a/d"]
    store.put("a/b", b"now an object where a folder was")
    assert store.get("a/b").startswith(b"now")


def test_a_key_below_a_key_is_refused_in_words(store: ObjectStore) -> None:
    store.put("a", b"")
    with pytest.raises(InvalidKey, match="below another"):
        store.put("a/b", b"")


def test_lists_are_sorted_by_bytes_and_filtered_by_prefix(store: ObjectStore) -> None:
    keys = ["a-b/x", "a/b", "a/b0", "a/c/d", "a0", "b/é", "b/z", "ckpt/0000000001-a0001/MANIFEST.json", "Z"]
    for key in reversed(keys):
        store.put(key, key.encode())
    assert [found.key for found in store.list()] == sorted(keys, key=str.encode)
    assert [found.key for found in store.list("a/")] == ["a/b", "a/b0", "a/c/d"]
    assert [found.key for found in store.list("a/b")] == ["a/b", "a/b0"]
    assert [found.key for found in store.list("a/c")] == ["a/c/d"]
    assert [found.key for found in store.list("a")] == ["a-b/x", "a/b", "a/b0", "a/c/d", "a0"]
    assert list(store.list("none/")) == []
    assert [found.size for found in store.list("b/")] == [3, 4]
    listed = {found.key: found for found in store.list()}
    assert {key: store.head(key).etag for key in keys} == {key: listed[key].etag for key in keys}


def test_lists_go_on_over_pages(store: ObjectStore) -> None:
    keys = [f"many/{i:04d}" for i in range(1001)]  # a page of S3 holds 1000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    listed = store.list("many/")
    assert next(listed).key == keys[0]
    assert [found.key for found in listed] == keys[1:]


def test_if_absent_and_if_match(store: ObjectStore) -> None:
    first = store.put("key", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed, match="decide anew"):
        store.put("key", b"2", if_absent=True)
    second = store.put("key", b"2", if_match=first.etag)
    with pytest.raises(PreconditionFailed, match="decide anew"):
        store.put("key", b"3", if_match=first.etag)
    assert store.get("key") == b"2"
    store.put("key", b"4", if_match=second.etag)
    with pytest.raises(PreconditionFailed, match="decide anew"):
        store.put("absent", b"", if_match=second.etag)
    with pytest.raises(ValueError, match="exclude"):
        store.put("key", b"", if_absent=True, if_match="x")


@pytest.mark.parametrize("size", [3, 11 * MIB])
def test_put_file_if_absent(store: ObjectStore, tmp_path: Path, size: int) -> None:
    (tmp_path / "one").write_bytes(content(size))
    (tmp_path / "two").write_bytes(b"y" * size)
    store.put_file("key", tmp_path / "one", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put_file("key", tmp_path / "two", if_absent=True)
    assert store.get("key") == content(size)


def race(root: Callable[[], ObjectStore], write: Callable[[ObjectStore, int], object]) -> list[int]:
    """Return the numbers of the writers that won, each a client of its own."""
    together = threading.Barrier(WRITERS)

    def one(number: int) -> bool:
        client = root()
        together.wait()
        try:
            write(client, number)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(WRITERS) as pool:
        return [number for number, won in enumerate(pool.map(one, range(WRITERS))) if won]


def test_of_racing_creators_exactly_one_wins(root: Callable[[], ObjectStore]) -> None:
    winners = race(root, lambda client, number: client.put("key", b"%d" % number, if_absent=True))
    assert [b"%d" % number for number in winners] == [root().get("key")]


def test_of_racing_replacers_exactly_one_wins(root: Callable[[], ObjectStore]) -> None:
    etag = root().put("key", b"start").etag
    winners = race(root, lambda client, number: client.put("key", b"%d" % number, if_match=etag))
    assert [b"%d" % number for number in winners] == [root().get("key")]


def test_counting_by_compare_and_swap_loses_nothing(root: Callable[[], ObjectStore]) -> None:
    root().put("key", b"0")

    def add(client: ObjectStore, _: int) -> None:
        while True:
            data, info = client.get_with_info("key")
            try:
                client.put("key", b"%d" % (int(data) + 1), if_match=info.etag)
            except PreconditionFailed:
                continue
            return

    assert len(race(root, add)) == WRITERS
    assert root().get("key") == b"%d" % WRITERS


def test_capabilities_are_found_and_leave_nothing(store: ObjectStore) -> None:
    assert store.capabilities().compare_and_swap
    assert list(store.list()) == []


# --- what only a server does --------------------------------------------------------------------------------------


def test_wrong_keys_are_refused_and_not_taken_for_absence(server: Server, tmp_path: Path) -> None:
    wrong = folder_of(server.keys, tmp_path / "wrong", AWS_SECRET_ACCESS_KEY="not-the-secret")
    store = open_store("s3://conformance/", credentials=wrong)
    for action in (store.get, store.head, store.delete, lambda k: store.put(k, b""), lambda k: list(store.list(k))):
        with pytest.raises(PermissionDenied, match=r"credentials\.secretRef") as caught:
            action("absent")
        assert "not-the-secret" not in str(caught.value)


def test_rotated_keys_are_taken_up_by_a_store_in_use(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "rotated"
    store = open_store("s3://conformance/", credentials=folder_of(server.keys, folder))
    store.put("rotated", b"1")
    (folder / "AWS_SECRET_ACCESS_KEY").write_text("revoked")
    with pytest.raises(PermissionDenied):
        store.put("rotated", b"2")
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(server.keys.secret_access_key)
    store.put("rotated", b"3")
    assert store.get("rotated") == b"3"


def test_a_missing_bucket_is_told_from_a_missing_object(server: Server) -> None:
    store = open_store("s3://no-such-bucket/prefix/", credentials=server.credentials)
    for action in (store.get, store.head, lambda k: store.put(k, b""), lambda k: list(store.list(k))):
        with pytest.raises(BucketMissing, match="no-such-bucket"):
            action("key")


def test_a_server_that_is_down_is_unavailable(server: Server) -> None:
    with refused_endpoint() as endpoint:
        store = open_store(
            "s3://conformance/", credentials=server.credentials, endpoint_url=endpoint, settings=IMPATIENT
        )
        with pytest.raises(StorageUnavailable, match="check that the store is up"):
            store.get("key")


def test_a_large_file_tells_of_itself_on_the_way(server: Server, tmp_path: Path) -> None:
    told: list[None] = []
    settings = replace(SMALL_PARTS, moved=lambda: told.append(None))
    store = open_store("s3://conformance/large/", credentials=server.credentials, settings=settings)
    (tmp_path / "file").write_bytes(content(11 * MIB))
    store.put_file("key", tmp_path / "file")
    assert len(told) == 3
    store.get_to_file("key", tmp_path / "copy")
    assert len(told) == 3 + 2  # the first part is there at once


def test_a_failed_multipart_upload_leaves_nothing(server: Server, tmp_path: Path) -> None:
    store = open_store("s3://conformance/aborted/", credentials=server.credentials, settings=SMALL_PARTS)
    (tmp_path / "file").write_bytes(content(11 * MIB))
    store.put("key", b"first")
    with pytest.raises(PreconditionFailed):
        store.put_file("key", tmp_path / "file", if_absent=True)
    client = boto3.client(
        "s3",
        endpoint_url=server.keys.endpoint_url,
        aws_access_key_id=server.keys.access_key_id,
        aws_secret_access_key=server.keys.secret_access_key,
        region_name=server.keys.region,
    )
    assert client.list_multipart_uploads(Bucket="conformance").get("Uploads", []) == []


# --- what only a server in trouble does -----------------------------------------------------------------------------

BODY = b"0123456789"
ETAG = f'"{hashlib.md5(BODY).hexdigest()}"'
SEEN = {"ETag": ETAG, "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT"}
PART = {**SEEN, "Content-Range": "bytes 0-9/10"}
PATIENT = TransferSettings(retries=1, connect_timeout_seconds=1)


@dataclass(frozen=True)
class Answer:
    """What the scripted server says; it breaks the connection off when the body is shorter than it says."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    length: int | None = None


@contextlib.contextmanager
def scripted(*answers: Answer) -> Iterator[tuple[str, list[str]]]:
    """Serve the answers in turn; yield the endpoint and the methods that were asked."""
    asked: list[str] = []
    left = iter(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            asked.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = next(left)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
            self.end_headers()
            self.wfile.write(answer.body)
            self.close_connection = answer.length is not None

        do_GET = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def scripted_store(endpoint: str, server: Server, settings: TransferSettings = PATIENT) -> ObjectStore:
    return open_store("s3://conformance/", credentials=server.credentials, endpoint_url=endpoint, settings=settings)


CUT = Answer(206, PART, BODY[:4], length=10)


@pytest.mark.parametrize("read", [lambda s, _: s.get("key"), lambda s, path: s.get_to_file("key", path)])
def test_a_truncated_download_is_tried_again_and_then_reported(
    server: Server, tmp_path: Path, read: Callable[[ObjectStore, Path], object]
) -> None:
    with scripted(CUT, Answer(206, PART, BODY)) as (endpoint, asked):
        read(scripted_store(endpoint, server), tmp_path / "copy")
        assert asked == ["GET", "GET"]
    with scripted(CUT, CUT) as (endpoint, _), pytest.raises(StorageUnavailable, match="key"):
        read(scripted_store(endpoint, server), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_download_shorter_than_the_object_is_reported(server: Server, tmp_path: Path) -> None:
    lying = Answer(206, {**SEEN, "Content-Range": "bytes 0-9/10"}, BODY[:4])
    with scripted(lying, lying) as (endpoint, _), pytest.raises(StorageUnavailable, match="8 of 10 bytes"):
        scripted_store(endpoint, server, TransferSettings(part_bytes=20)).get_to_file("key", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_an_object_replaced_while_it_is_read_is_reported(server: Server, tmp_path: Path) -> None:
    answers = [Answer(206, PART, BODY[:5]), Answer(412, {})]
    with scripted(*answers) as (endpoint, _), pytest.raises(StorageUnavailable, match="replaced while it was read"):
        scripted_store(endpoint, server, TransferSettings(part_bytes=5)).get_to_file("key", tmp_path / "copy")


def test_outages_are_tried_again(server: Server) -> None:
    with scripted(Answer(503, {}), Answer(200, SEEN, BODY)) as (endpoint, asked):
        assert scripted_store(endpoint, server).get("key") == BODY
        assert asked == ["GET", "GET"]
    with scripted(Answer(503, {}), Answer(500, {})) as (endpoint, _), pytest.raises(StorageUnavailable, match="500"):
        scripted_store(endpoint, server).get("key")


def test_conflicts_are_tried_again(server: Server) -> None:
    with scripted(Answer(409, {}), Answer(200, SEEN)) as (endpoint, asked):
        scripted_store(endpoint, server).put("key", BODY, if_absent=True)
        assert asked == ["PUT", "PUT"]


def test_a_write_whose_answer_was_lost_is_recognised_as_its_own(server: Server) -> None:
    applied = [Answer(500, {}), Answer(412, {}), Answer(200, SEEN)]
    with scripted(*applied) as (endpoint, asked):
        assert scripted_store(endpoint, server).put("key", BODY, if_absent=True).etag == ETAG
        assert asked == ["PUT", "PUT", "HEAD"]
    by_another = [Answer(500, {}), Answer(412, {}), Answer(200, {**SEEN, "ETag": '"other"'})]
    with scripted(*by_another) as (endpoint, _), pytest.raises(PreconditionFailed):
        scripted_store(endpoint, server).put("key", BODY, if_absent=True)


def test_a_server_that_ignores_conditions_is_found_out(server: Server) -> None:
    answers = [Answer(200, {"ETag": f'"{i}"'}) for i in range(4)]
    with scripted(*answers, Answer(204, {})) as (endpoint, asked):
        found = scripted_store(endpoint, server).capabilities()
    assert asked == ["PUT"] * 4 + ["DELETE"]
    assert not found.create_if_absent
    assert not found.replace_if_match


def test_every_error_is_a_storage_error() -> None:
    assert all(issubclass(kind, StorageError) for kind in (NotFound, BucketMissing, PermissionDenied, InvalidKey))
