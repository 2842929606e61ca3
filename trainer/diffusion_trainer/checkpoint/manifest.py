"""MANIFEST.json: what a checkpoint consists of, and how each file must hash."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusion_trainer.errors import CheckpointUnsupported

VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\.(safetensors|json)")  # what is downloaded gets this name on our disk
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """One file of a checkpoint; `key` is its name below the checkpoint's folder."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a checkpoint and what wrote them. `parent` is the folder of the checkpoint before it."""

    step: int
    attempt: int
    created: float
    parent: str | None
    files: tuple[File, ...]
    versions: dict[str, str]

    def encode(self) -> bytes:
        """Return the JSON of MANIFEST.json."""
        return (json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n").encode()


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Return the manifest in the bytes of MANIFEST.json, whose hash was verified before.

    Raises `CheckpointUnsupported`: as its hash is right it is not damaged, so that falling back would be wrong.
    """
    try:
        raw: dict[str, Any] = json.loads(data)
        version = raw.pop("version")
        if version == VERSION:
            files = tuple(_file(**file) for file in raw.pop("files"))
            return Manifest(**raw, files=files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointUnsupported(
            f"read {where}: this release cannot read it ({error}); use the trainer image that wrote it"
        ) from error
    raise CheckpointUnsupported(
        f"read {where}: version {version!r} was written by another release (this one knows {VERSION}); "
        "use the trainer image that wrote it, or a newer one"
    )


def _file(*, key: str, size: int, sha256: str) -> File:
    if not _NAME.fullmatch(key):
        raise ValueError(f"{key!r} is no name of a checkpoint's file")
    return File(key, size, sha256)


def sha256_of(path: Path) -> str:
    """Return the hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what determines the bits of a checkpoint."""
    found = {}
    for name in ("torch", "diffusers", "safetensors", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
