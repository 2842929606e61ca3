"""The trainer's side of publication: stage to host memory, hand over, go on training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from diffusion_trainer.checkpoint.head import Entry, Lease
from diffusion_trainer.checkpoint.ledger import Retention
from diffusion_trainer.checkpoint.snapshot import Snapshot
from diffusion_trainer.objectstore import ObjectStore


@dataclass(frozen=True, slots=True)
class Saved:
    """One acknowledged save: how long training stood still for it, how long the upload took, and its size."""

    entry: Entry
    stall_seconds: float
    upload_seconds: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where and as whom to publish. Picklable: `open_store` is e.g. `functools.partial(open_store, uri)`."""

    open_store: Callable[[], ObjectStore]
    lease: Lease
    run_spec_sha: str
    retention: Retention = field(default_factory=Retention)


class Publisher:
    """Publishes snapshots from another process, one at a time. Used by rank 0 only, from one thread.

    Start it early (it starts a process), use it as a context manager. Failures of the uploader (`Fenced`,
    StorageError, `UploaderDied`) are raised by the next call of any method, once each.
    """

    def __init__(
        self,
        target: Target,
        *,
        staging: Path,
        on_warning: Callable[[str], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        raise NotImplementedError

    def try_save(self, snapshot: Snapshot, *, best: tuple[str, float] | None = None) -> bool:
        """Stage and hand over; return False at once, and count it in `skipped`, while an earlier save is in flight.

        When it returns the caller may change its tensors again.
        """
        raise NotImplementedError

    def save(self, snapshot: Snapshot, *, best: tuple[str, float] | None = None, wait: bool = False) -> None:
        """Wait for an earlier save, then stage and hand over; with `wait` return only when it is acknowledged."""
        raise NotImplementedError

    def flush(self, *, deadline_seconds: float) -> bool:
        """Wait for the save in flight; return whether none is in flight any more."""
        raise NotImplementedError

    @property
    def committed(self) -> int | None:
        """Return the last acknowledged step of this publisher (never raises; `poll` does)."""
        raise NotImplementedError

    @property
    def in_flight(self) -> int | None:
        """Return the step being uploaded."""
        raise NotImplementedError

    @property
    def skipped(self) -> int:
        """Return how often `try_save` found the uploader busy."""
        raise NotImplementedError

    @property
    def saved(self) -> Saved | None:
        """Return the last acknowledged save with its measured times."""
        raise NotImplementedError

    def poll(self) -> None:
        """Take note of what the uploader reported; raise its failure. Costs microseconds; call it every step."""
        raise NotImplementedError

    def close(self, *, deadline_seconds: float = 600.0) -> None:
        """Finish the save in flight, end the uploader, remove the staging folder. Raises like `flush`."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError
