"""The `s3://` backend: boto3 behind the protocol."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from diffusion_trainer.errors import (
    Conflict,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StorageRejected,
    StorageUnavailable,
)
from diffusion_trainer.objectstore.atomic import replaced
from diffusion_trainer.objectstore.base import Capabilities, ObjectInfo
from diffusion_trainer.objectstore.keys import check_key, check_prefix
from diffusion_trainer.objectstore.parallel import in_parallel
from diffusion_trainer.objectstore.s3_client import S3Connection
from diffusion_trainer.objectstore.s3_errors import status_of, translated, was_retried
from diffusion_trainer.objectstore.s3_multipart import MultipartUpload, md5

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")
_CONFLICTS = 8  # 409 means that another conditional write is in flight: it is over in a moment


class S3Store:
    """`ObjectStore` over a bucket, or a prefix of one."""

    def __init__(self, connection: S3Connection, *, bucket: str, prefix: str) -> None:
        self._connection = connection
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._capabilities: Capabilities | None = None

    @property
    def uri(self) -> str:  # noqa: D102 - the protocol says it; likewise below
        return f"s3://{self._bucket}/{self._prefix}"

    def get(self, key: str) -> bytes:  # noqa: D102
        return self.get_with_info(key)[0]

    def get_with_info(self, key: str) -> tuple[bytes, ObjectInfo]:  # noqa: D102
        return self._fetch("get", key, {})

    def get_range(self, key: str, *, offset: int, length: int) -> bytes:  # noqa: D102
        if offset < 0 or length < 0:
            raise ValueError(f"get_range: offset {offset} and length {length} must not be negative")
        if length == 0:
            self.head(key)
            return b""
        try:
            return self._fetch("get_range", key, {"Range": _range(offset, length)})[0]
        except StorageRejected as error:
            if _past_the_end(error):
                return b""
            raise

    def get_to_file(self, key: str, path: Path) -> ObjectInfo:  # noqa: D102
        settings = self._connection.settings
        with replaced(path) as file:
            first, info = self._first_part(key)
            _write_at(file.fileno(), first, 0)

            def fetch(offset: int) -> None:
                # IfMatch: parts of two versions of an object must never meet in one file.
                options = {"Range": _range(offset, settings.part_bytes), "IfMatch": info.etag}
                data, _ = self._fetch("get_to_file", key, options)
                _write_at(file.fileno(), data, offset)
                settings.moved()

            try:
                in_parallel(fetch, range(len(first), info.size, settings.part_bytes), parallel=settings.parallel)
            except PreconditionFailed as error:
                raise self._torn(key, "it was replaced while it was read") from error
            found = os.fstat(file.fileno()).st_size
            if found != info.size:
                raise self._torn(key, f"{found} of {info.size} bytes came")
        return info

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> ObjectInfo:  # noqa: D102
        if if_absent and if_match is not None:
            raise ValueError("put: if_absent and if_match exclude each other")
        request = {"Body": data, **md5(data), **_condition(if_absent=if_absent, if_match=if_match)}
        try:
            etag = str(self._call("put", key, lambda client, at: client.put_object(**at, **request))["ETag"])
        except NotFound as error:
            if if_match is None:
                raise
            # What AWS answers to If-Match where nothing is.
            raise PreconditionFailed(f"put {self.uri}{key}: the object does not exist any more; decide anew") from error
        except PreconditionFailed as error:
            # The SDK tries again where an answer was lost, and may meet what it wrote itself.
            etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
            if not (was_retried(error) and self.head(key).etag == etag):
                raise
        return ObjectInfo(key=key, size=len(data), etag=etag, modified=time.time())

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> ObjectInfo:  # noqa: D102
        size = path.stat().st_size
        if size <= self._connection.settings.multipart_bytes:
            return self.put(key, path.read_bytes(), if_absent=if_absent)
        upload = MultipartUpload(self._call, key=key, path=path, size=size, settings=self._connection.settings)
        etag = upload.run(_condition(if_absent=if_absent, if_match=None), find=lambda: self.head(key))
        return ObjectInfo(key=key, size=size, etag=etag, modified=time.time())

    def head(self, key: str) -> ObjectInfo:  # noqa: D102
        try:
            answer = self._call("head", key, lambda client, at: client.head_object(**at))
        except NotFound:
            # The answer has no body, so that an absent bucket looks like an absent object.
            with contextlib.suppress(PermissionDenied):
                self._call("head", key, lambda client, _: client.list_objects_v2(Bucket=self._bucket, MaxKeys=1))
            raise
        return _info(key, answer)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:  # noqa: D102
        check_prefix(prefix, where=self.uri)
        return self._listed(prefix)

    def delete(self, key: str) -> None:  # noqa: D102
        try:
            self._call("delete", key, lambda client, at: client.delete_object(**at))
        except NotFound:  # S3 itself answers 204; some servers do not
            return

    def capabilities(self) -> Capabilities:  # noqa: D102
        if self._capabilities is None:
            self._capabilities = Capabilities(True, True) if self._connection.is_aws else self._probed()
        return self._capabilities

    def _first_part(self, key: str) -> tuple[bytes, ObjectInfo]:
        """Return the head of an object and its info by one request: most objects are smaller than a part."""
        try:
            return self._fetch("get_to_file", key, {"Range": _range(0, self._connection.settings.part_bytes)})
        except StorageRejected as error:
            if _past_the_end(error):  # there is no first byte
                return b"", self.head(key)
            raise

    def _torn(self, key: str, what: str) -> StorageUnavailable:
        return StorageUnavailable(f"get_to_file {self.uri}{key}: {what}; try again")

    def _probed(self) -> Capabilities:
        """Try conditional writes: servers that do not know them ignore the headers or answer 501."""
        key = f"capability-probe-{secrets.token_hex(8)}"
        try:
            first = self.put(key, b"1")
            absent = self._loses(lambda: self.put(key, b"2", if_absent=True))
            again = self.put(key, b"3")
            match = again.etag != first.etag and self._loses(lambda: self.put(key, b"4", if_match=first.etag))
        finally:
            self.delete(key)
        return Capabilities(create_if_absent=absent, replace_if_match=match)

    @staticmethod
    def _loses(write: Callable[[], object]) -> bool:
        try:
            write()
        except PreconditionFailed:
            return True
        except StorageRejected:
            return False
        return False

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        token: dict[str, Any] = {}
        while True:
            page = self._page(prefix, token)
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # "folders" that consoles make
                    yield _info(found["Key"].removeprefix(self._prefix), found)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, token: dict[str, Any]) -> Any:
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix, **token}
        return self._call("list", prefix, lambda client, _: client.list_objects_v2(**request))

    def _fetch(self, operation: str, key: str, options: dict[str, Any]) -> tuple[bytes, ObjectInfo]:
        """Return a body read to its end. The SDK retries requests but not bodies that break off."""
        tries = self._connection.settings.retries + 1

        def read(client: S3Client, at: dict[str, Any]) -> tuple[bytes, ObjectInfo]:
            for left in reversed(range(tries)):
                answer = client.get_object(**at, **options)
                try:
                    # closing(): StreamingBody's own context manager hands out the raw stream, which checks no length.
                    with contextlib.closing(answer["Body"]) as body:
                        return body.read(), _info(key, answer)
                except (BotoCoreError, OSError):
                    if not left:
                        raise
            raise AssertionError("unreachable")

        return self._call(operation, key, read)

    def _call(self, operation: str, key: str, action: Callable[[S3Client, dict[str, Any]], T]) -> T:
        """Run one request: conflicts are tried again, and refusals once more when the credentials were rotated."""
        if operation != "list":
            check_key(key, where=self.uri)
        at = {"Bucket": self._bucket, "Key": self._prefix + key}
        credentials = self._connection.credentials
        rotated = False
        conflicts = 0
        while True:
            version = credentials.version() if credentials else ()
            try:
                with translated(operation, f"{self.uri}{key}"):
                    return action(self._connection.client, at)
            except Conflict:
                conflicts += 1
                if conflicts == _CONFLICTS:
                    raise
                time.sleep(random.uniform(0, 0.05 * 2**conflicts))  # noqa: S311 - jitter
            except PermissionDenied:
                if rotated or credentials is None or credentials.version() == version:
                    raise
                rotated = True


def _condition(*, if_absent: bool, if_match: str | None) -> dict[str, Any]:
    if if_absent:
        return {"IfNoneMatch": "*"}
    return {} if if_match is None else {"IfMatch": if_match}


def _info(key: str, answer: Mapping[str, Any]) -> ObjectInfo:
    """Return the info in an answer to GET or HEAD, or in an item of a list."""
    size = answer.get("Size", answer.get("ContentLength"))
    whole = str(answer.get("ContentRange", "")).rpartition("/")[2]  # "bytes 0-99/1234": the answer is a part
    return ObjectInfo(
        key=key,
        size=int(whole) if whole.isdigit() else int(size or 0),
        etag=answer["ETag"],
        modified=answer["LastModified"].timestamp(),
    )


def _range(offset: int, length: int) -> str:
    return f"bytes={offset}-{offset + length - 1}"


def _past_the_end(error: StorageError) -> bool:
    return isinstance(error.__cause__, ClientError) and status_of(error.__cause__) == 416


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
