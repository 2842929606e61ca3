"""From a URI to a store."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

from diffusion_trainer.errors import InvalidUri, UnsupportedScheme
from diffusion_trainer.objectstore.base import ObjectStore
from diffusion_trainer.objectstore.credentials import Credentials
from diffusion_trainer.objectstore.keys import check_key
from diffusion_trainer.objectstore.settings import TransferSettings

SUPPORTED = ("file:///path/", "s3://bucket/prefix/")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def open_store(
    uri: str,
    *,
    credentials: Credentials | None = None,
    endpoint_url: str | None = None,
    settings: TransferSettings | None = None,
) -> ObjectStore:
    """Return the store whose root is `uri`; nothing is contacted yet, and the root need not exist.

    `credentials` None means the environment's own (IRSA, Pod Identity, the SDK's default chain). `endpoint_url` names
    an S3 server other than AWS and wins over the one in `credentials`. For another process pass
    `functools.partial(open_store, uri, credentials=...)`: it pickles, and without any secret.

    Raises:
        InvalidUri: the URI is malformed.
        UnsupportedScheme: no backend serves its scheme.

    """
    scheme, rest = _split_scheme(uri)
    chosen = settings or TransferSettings()
    if scheme == "file":
        from diffusion_trainer.objectstore.file import FileStore

        return FileStore(_folder(uri, rest))
    from diffusion_trainer.objectstore.s3 import S3Store
    from diffusion_trainer.objectstore.s3_client import S3Connection

    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidUri(
            f"open {uri}: {bucket!r} is no bucket name; write s3://bucket/prefix/ (3 to 63 of a-z 0-9 . -)"
        )
    prefix = _checked(uri, prefix)
    connection = S3Connection(credentials=credentials, endpoint_url=endpoint_url, settings=chosen)
    return S3Store(connection, bucket=bucket, prefix=prefix)


def join_uri(root: str, *segments: str) -> str:
    """Return the URI of the folder below `root`, ending in "/". The segments are plain text: file URIs quote them."""
    plain = [segment.strip("/") for segment in segments]
    quoted = [quote(segment) for segment in plain] if root.lower().startswith("file:") else plain
    return "/".join([root.removesuffix("/"), *quoted]) + "/"


def split_uri(uri: str) -> tuple[str, str]:
    """Return the URI of the root and the key of an object named by one URI. Raises `InvalidUri`."""
    scheme, rest = _split_scheme(uri)
    parent, slash, key = rest.rpartition("/")
    if not slash or not key or (scheme == "s3" and not parent):
        raise InvalidUri(f"split {uri}: it names no object; write the bucket or folder and the object's name")
    return f"{uri[: len(uri) - len(rest)]}{parent}/", unquote(key) if scheme == "file" else key


def _split_scheme(uri: str) -> tuple[str, str]:
    match = _SCHEME.fullmatch(uri)
    if match is None:
        raise InvalidUri(f"open {uri}: a URI of a store starts with its scheme; write one of {', '.join(SUPPORTED)}")
    scheme, rest = match[1].lower(), match[2]
    if scheme not in {"file", "s3"}:
        raise UnsupportedScheme(f"open {uri}: {scheme}:// is not supported; use one of {', '.join(SUPPORTED)}")
    return scheme, rest


def _folder(uri: str, rest: str) -> Path:
    if not rest.startswith("/"):
        raise InvalidUri(f"open {uri}: file URIs name no host; write file:///{rest}")
    return Path("/" + _checked(uri, unquote(rest).strip("/")))


def _checked(uri: str, prefix: str) -> str:
    """Return the prefix without its closing slash, validated like a key."""
    bare = prefix.removesuffix("/")
    if bare:
        check_key(bare, error=InvalidUri, where=uri)
    return bare
