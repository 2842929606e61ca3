"""What the S3 SDK raises, in the words of the trainer's own errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from diffusion_trainer.errors import (
    BucketMissing,
    Conflict,
    InvalidKey,
    InvalidUri,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StorageRejected,
    StorageUnavailable,
)

_BY_CODE: dict[str, tuple[type[StorageError], str]] = {
    "NoSuchBucket": (BucketMissing, "create the bucket, or correct its name and the endpoint"),
    # The upload was aborted under us (a lifecycle rule, or another process): that is not an absent object.
    "NoSuchUpload": (StorageUnavailable, "lengthen the bucket's rule that aborts incomplete uploads, and try again"),
    "InvalidBucketName": (InvalidUri, "correct the bucket's name"),
    "PermanentRedirect": (InvalidUri, "name the bucket's own region or endpoint"),
    "AuthorizationHeaderMalformed": (InvalidUri, "name the bucket's own region (AWS_REGION)"),
    "RequestTimeTooSkewed": (StorageUnavailable, "the clock of this node is wrong: have it synchronised"),
    "SlowDown": (StorageUnavailable, "the store throttles: spread the load, or try again later"),
    "RequestTimeout": (StorageUnavailable, "check the network to the store"),
    # A folder behind an S3 server (versitygw, MinIO's file system mode) cannot hold a key below a key.
    "ObjectParentIsFile": (InvalidKey, "rename it: this server cannot hold a key below another"),
    "ExistingObjectIsDirectory": (InvalidKey, "rename it: this server cannot hold a key that other keys lie below"),
    "XMinioParentIsObject": (InvalidKey, "rename it: this server cannot hold a key below another"),
    "XMinioObjectExistsAsDirectory": (InvalidKey, "rename it: this server cannot hold a key that others lie below"),
}
_REFUSED = (
    PermissionDenied,
    "check credentials.secretRef or the service account, and its policy (without s3:ListBucket absence is a refusal)",
)
_BY_STATUS: dict[int, tuple[type[StorageError], str]] = {
    401: _REFUSED,
    403: _REFUSED,
    404: (NotFound, "check the URI"),
    409: (Conflict, "another writer is at work on this key: try again"),
    412: (PreconditionFailed, "read it again and decide anew"),
    429: (StorageUnavailable, "the store throttles: spread the load, or try again later"),
}
_DOWN = (StorageUnavailable, "check that the store is up, and the endpoint, network policy and DNS")


def code_of(error: ClientError) -> str:
    """Return the code of S3's answer ("NoSuchKey"; the status where the answer had no body)."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """Return the HTTP status of S3's answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def was_retried(error: StorageError) -> bool:
    """Return whether the SDK had sent the failed request before: then the earlier one may have been carried out."""
    cause = error.__cause__
    return isinstance(cause, ClientError) and bool(cause.response.get("ResponseMetadata", {}).get("RetryAttempts"))


@contextlib.contextmanager
def translated(operation: str, uri: str) -> Iterator[None]:
    """Raise the SDK's errors as our own, with the operation, the URI and a remedy."""
    try:
        yield
    except ClientError as error:
        kind, remedy = _classified(error)
        raise kind(f"{operation} {uri}: {_said(error)}; {remedy}") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise PermissionDenied(
            f"{operation} {uri}: no credentials were found; name a Secret in credentials.secretRef, or a service "
            "account with IRSA or Pod Identity in credentials.serviceAccountName"
        ) from error
    except ParamValidationError as error:
        raise InvalidUri(f"{operation} {uri}: {' '.join(str(error).split())}; correct the URI") from error
    except (
        BotoCoreError,
        OSError,
    ) as error:  # connections, timeouts, streams that broke off
        raise StorageUnavailable(f"{operation} {uri}: {error}; {_DOWN[1]}") from error


def _classified(error: ClientError) -> tuple[type[StorageError], str]:
    code, status = code_of(error), status_of(error)
    if code in _BY_CODE:
        return _BY_CODE[code]
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if code in {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}:
        return _REFUSED
    if status >= 500 and status != 501:
        return _DOWN
    return StorageRejected, "see what the store says"


def _said(error: ClientError) -> str:
    answer = error.response.get("Error", {})
    message = str(answer.get("Message", "")).strip()
    return f"{code_of(error)} ({status_of(error)}{': ' + message if message else ''})"
