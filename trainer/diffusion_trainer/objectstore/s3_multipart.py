"""Uploads in parts. `upload_file` of boto3 cannot make the completion conditional, so the parts are driven here."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from diffusion_trainer.errors import PreconditionFailed, StorageError, StorageUnavailable
from diffusion_trainer.objectstore.base import ObjectInfo
from diffusion_trainer.objectstore.parallel import in_parallel
from diffusion_trainer.objectstore.s3_errors import was_retried
from diffusion_trainer.objectstore.settings import MIB, TransferSettings

_MOST_PARTS = 10_000


class Call(Protocol):
    """Runs one request with the store's errors and retries."""

    def __call__(self, operation: str, key: str, action: Callable[[Any, dict[str, Any]], Any]) -> Any:
        """Run `action(client, {"Bucket": ..., "Key": ...})`."""
        ...


class MultipartUpload:
    """One file on its way to one key. Nothing is visible before the completion, and a failure leaves nothing behind."""

    def __init__(self, call: Call, *, key: str, path: Path, size: int, settings: TransferSettings) -> None:
        self._call = call
        self._key = key
        self._path = path
        self._size = size
        self._parallel = settings.parallel
        self._moved = settings.moved
        self._part = max(settings.part_bytes, -(-size // _MOST_PARTS // MIB) * MIB)

    def run(self, condition: dict[str, Any], *, find: Callable[[], ObjectInfo]) -> str:
        """Upload and return the etag. `find` asks the store what lies at the key. Raises `PreconditionFailed`."""
        upload = self._call("put_file", self._key, lambda client, at: client.create_multipart_upload(**at))["UploadId"]
        try:
            parts = self._parts(upload)
            return self._completed(upload, parts, condition, find)
        except BaseException as error:
            self._abort(upload, error)
            raise

    def _parts(self, upload: str) -> list[str]:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:

            def send(offset: int) -> str:
                data = _read_at(descriptor, offset, min(self._part, self._size - offset), path=self._path)
                number = offset // self._part + 1
                part = {"UploadId": upload, "PartNumber": number, "Body": data, **md5(data)}
                answer = self._call("put_file", self._key, lambda client, at: client.upload_part(**at, **part))
                self._moved()
                return str(answer["ETag"])

            return in_parallel(send, range(0, self._size, self._part), parallel=self._parallel)
        finally:
            os.close(descriptor)

    def _completed(
        self, upload: str, parts: list[str], condition: dict[str, Any], find: Callable[[], ObjectInfo]
    ) -> str:
        listed = {"Parts": [{"PartNumber": i, "ETag": etag} for i, etag in enumerate(parts, start=1)]}
        request = {"UploadId": upload, "MultipartUpload": listed, **condition}
        try:
            answer = self._call(
                "put_file", self._key, lambda client, at: client.complete_multipart_upload(**at, **request)
            )
        except (PreconditionFailed, StorageUnavailable) as error:
            # The completion may have been carried out and its answer lost: then the SDK's next try finds the upload
            # gone, or the object there.
            if was_retried(error) and find().etag.strip('"') == _etag_of(parts):
                return find().etag
            raise
        return str(answer["ETag"])

    def _abort(self, upload: str, cause: BaseException) -> None:
        try:
            self._call("put_file", self._key, lambda client, at: client.abort_multipart_upload(**at, UploadId=upload))
        except StorageError as error:
            cause.add_note(f"the parts uploaded so far could not be removed: {error}")


def md5(data: bytes) -> dict[str, str]:
    """Return the header by which the server refuses a body that was damaged on the way."""
    return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}


def _etag_of(parts: list[str]) -> str | None:
    """Return the etag that S3 gives to these parts; None where its etags are no hashes (SSE-KMS)."""
    try:
        digests = b"".join(bytes.fromhex(etag.strip('"')) for etag in parts)
    except ValueError:
        return None
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"


def _read_at(descriptor: int, offset: int, length: int, *, path: Path) -> bytes:
    data = b""
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise ValueError(f"{path} became shorter while it was uploaded; it must not change meanwhile")
        data += more
    return data
