"""How objects are moved: sizes, parallelism, retries and time limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MIB = 1024 * 1024


def _nobody() -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Numbers from the reference on storage: parts of 16 to 64 MiB, 8 to 16 of them at once, 8 retries.

    Files above `multipart_bytes` travel in parts of `part_bytes`, `parallel` at a time. S3 allows 10 000 parts and no
    part but the last under 5 MiB; `part_bytes` grows by itself where a file would need more.
    """

    part_bytes: int = 32 * MIB
    multipart_bytes: int = 64 * MIB
    parallel: int = 8
    retries: int = 8
    connect_timeout_seconds: float = 5.0
    read_timeout_seconds: float = 30.0
    moved: Callable[[], None] = _nobody
    """Called after each part of a large file, from several threads: a download of an hour is no hang."""
