"""What S3 says, in the trainer's own errors: their class decides the exit code, and so whether a run is tried again."""

from __future__ import annotations

import pickle

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)

from diffusion_trainer import errors
from diffusion_trainer.objectstore.s3_errors import translated, was_retried


def answer(code: str, status: int, *, retries: int = 0) -> ClientError:
    metadata = {"HTTPStatusCode": status, "RetryAttempts": retries}
    return ClientError({"Error": {"Code": code, "Message": "words"}, "ResponseMetadata": metadata}, "PutObject")


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (answer("NoSuchKey", 404), errors.NotFound),
        (answer("404", 404), errors.NotFound),
        (answer("NoSuchBucket", 404), errors.BucketMissing),
        (answer("NoSuchUpload", 404), errors.StorageUnavailable),  # an aborted upload is no missing input
        (answer("AccessDenied", 403), errors.PermissionDenied),
        (answer("403", 403), errors.PermissionDenied),
        (answer("InvalidAccessKeyId", 403), errors.PermissionDenied),
        (answer("SignatureDoesNotMatch", 403), errors.PermissionDenied),
        (answer("ExpiredToken", 400), errors.PermissionDenied),
        (answer("Unauthorized", 401), errors.PermissionDenied),
        (answer("RequestTimeTooSkewed", 403), errors.StorageUnavailable),
        (answer("PreconditionFailed", 412), errors.PreconditionFailed),
        (answer("ConditionalRequestConflict", 409), errors.Conflict),
        (answer("SlowDown", 503), errors.StorageUnavailable),
        (answer("TooManyRequests", 429), errors.StorageUnavailable),
        (answer("InternalError", 500), errors.StorageUnavailable),
        (answer("RequestTimeout", 400), errors.StorageUnavailable),
        (answer("NotImplemented", 501), errors.StorageRejected),
        (answer("EntityTooSmall", 400), errors.StorageRejected),
        (answer("PermanentRedirect", 301), errors.InvalidUri),
        (answer("ObjectParentIsFile", 409), errors.InvalidKey),
        (EndpointConnectionError(endpoint_url="http://x"), errors.StorageUnavailable),
        (ConnectTimeoutError(endpoint_url="http://x"), errors.StorageUnavailable),
        (ReadTimeoutError(endpoint_url="http://x"), errors.StorageUnavailable),
        (ConnectionClosedError(endpoint_url="http://x"), errors.StorageUnavailable),
        (ConnectionResetError(104, "reset"), errors.StorageUnavailable),
        (NoCredentialsError(), errors.PermissionDenied),
        (ParamValidationError(report="bad"), errors.InvalidUri),
    ],
)
def test_every_answer_has_its_class_and_says_what_where_and_what_to_do(
    raised: Exception, kind: type[errors.StorageError]
) -> None:
    with pytest.raises(errors.StorageError, match=r"^put s3://b/k: .*; \S+") as caught, translated("put", "s3://b/k"):
        raise raised
    assert type(caught.value) is kind
    assert caught.value.__cause__ is raised
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (type(copied), str(copied)) == (kind, str(caught.value))


def test_our_own_errors_pass_unchanged() -> None:
    with pytest.raises(errors.PermissionDenied, match=r"^mine$"), translated("put", "s3://bucket/key"):
        raise errors.PermissionDenied("mine")


def test_a_request_that_was_sent_twice_is_known() -> None:
    for retries in (0, 1):
        with pytest.raises(errors.PreconditionFailed) as caught, translated("put", "s3://bucket/key"):
            raise answer("PreconditionFailed", 412, retries=retries)
        assert was_retried(caught.value) is bool(retries)
