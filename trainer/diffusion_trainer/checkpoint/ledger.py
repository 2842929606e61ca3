"""The ledger of a job's checkpoints: the fence, commits, and reading back. One process uses one ledger, one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusion_trainer.checkpoint.head import Entry, Head, Lease
from diffusion_trainer.checkpoint.snapshot import Snapshot
from diffusion_trainer.objectstore import ObjectStore


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept: the last checkpoints, the best one, and for how long leftovers of older attempts."""

    keep_last: int = 2
    orphan_seconds: float = 24 * 3600.0


class Ledger:
    """Checkpoints of one job below the root of `store` (a prefix that belongs to the job alone)."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        attempt: int,
        run_spec_sha: str,
        retention: Retention = Retention(),
        clock: Callable[[], float] = time.time,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        raise NotImplementedError

    def acquire(self) -> Head:
        """Take the fence for this attempt and return the HEAD to resume from.

        From here on every older attempt, and an older start of this one, fails with `Fenced` at its next commit.

        Raises:
            Fenced: a newer attempt holds it.
            SpecChanged: the checkpoints here belong to another `run_spec_sha` (the fence is not taken).
            CheckpointUnsupported: the store has no conditional writes, or a newer release wrote HEAD.json.
            StorageError: as the store raised it.

        """
        raise NotImplementedError

    def adopt(self, lease: Lease) -> None:
        """Publish under a fence that another process of this attempt acquired."""
        raise NotImplementedError

    def load(self, *, scratch: Path | None = None) -> Snapshot | None:
        """Return the newest checkpoint that verifies, None when none was ever published.

        Raises:
            CheckpointCorrupt: there are entries, and not one of them is whole.
            StorageError: the store could not answer (that is never taken for damage or absence).

        """
        raise NotImplementedError

    def read(self, entry: Entry, *, scratch: Path | None = None) -> Snapshot:
        """Return one checkpoint (for the other ranks: what rank 0 loaded, `loaded`). Raises `CheckpointCorrupt`."""
        raise NotImplementedError

    @property
    def loaded(self) -> Entry | None:
        """Return the entry that the last `load` returned."""
        raise NotImplementedError

    def publish(
        self, snapshot: Snapshot, *, best: tuple[str, float] | None = None, scratch: Path | None = None
    ) -> Entry:
        """Publish synchronously; when it returns, the checkpoint is acknowledged.

        `best` (metric, value) pins it as the best one. Raises `Fenced` and StorageError; after `StorageUnavailable`
        the outcome is unknown and publishing the same step again is safe.
        """
        raise NotImplementedError
