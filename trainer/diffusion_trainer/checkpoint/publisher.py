"""The trainer's side of publication: stage to host memory, hand over, go on training."""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing
import multiprocessing.util
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from diffusion_trainer.checkpoint.head import Entry
from diffusion_trainer.checkpoint.messages import Committed, Failed, Job, Target, Warned
from diffusion_trainer.checkpoint.snapshot import Snapshot
from diffusion_trainer.checkpoint.staging import Staging, claimed
from diffusion_trainer.checkpoint.uploader import serve
from diffusion_trainer.errors import TrainerError, UploaderDied

# How long a trainer that ends with an error lets an upload in flight go on: enough for adapters, and little enough for
# the shortest grace period (15 s on GKE Spot, of which the trainer may have spent 60 % before it ends with an error).
_CRASH_SECONDS = 3.0
_END_SECONDS = 5.0  # an idle uploader ends at once


@dataclass(frozen=True, slots=True)
class Saved:
    """One acknowledged save: how long training stood still for it, how long the upload took, and its size.

    `best` (metric, value) where it was pinned.
    """

    entry: Entry
    stall_seconds: float
    upload_seconds: float
    size_bytes: int
    best: tuple[str, float] | None = None


class Publisher:
    """Publishes snapshots from another process, one at a time. Used by rank 0 only, from one thread.

    Start it early (it starts a process), and use it as a context manager. Failures of the uploader (`Fenced`,
    StorageError, `UploaderDied`) are raised by the next call of `poll`, `try_save`, `save`, `flush` or `close`, once
    each; after a StorageError another save may be tried.
    """

    def __init__(
        self,
        target: Target,
        *,
        staging: Path,
        on_warning: Callable[[str], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the uploader.

        `staging` is a folder with room for one checkpoint; a folder in memory (/dev/shm, an emptyDir of memory) makes
        the stall shortest. `on_warning` is called by the methods named above.
        """
        self._warn = on_warning or (lambda _: None)
        self._monotonic = monotonic
        self._committed: int | None = None
        self._in_flight: int | None = None
        self._skipped = 0
        self._saved: Saved | None = None
        self._stall_seconds = 0.0
        self._best: tuple[str, float] | None = None
        self._resources = contextlib.ExitStack()
        folder = self._resources.enter_context(claimed(staging))
        self._staging = Staging(folder)
        self._resources.callback(self._staging.remove)
        # spawn: a fork of a process that has threads and CUDA is not safe.
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, target, folder), name="checkpoint-uploader")
        self._process.start()
        theirs.close()  # so that its end is seen here
        atexit.register(self._end, _CRASH_SECONDS)

    def try_save(self, snapshot: Snapshot, *, best: tuple[str, float] | None = None) -> bool:
        """Stage and hand over; return False at once, and count it in `skipped`, while an earlier save is in flight.

        When it returns the caller may change its tensors again. `best` (metric, value) pins this checkpoint.
        """
        self.poll()
        if self._in_flight is not None:
            self._skipped += 1
            return False
        self._hand_over(snapshot, best)
        return True

    def save(self, snapshot: Snapshot, *, best: tuple[str, float] | None = None, wait: bool = False) -> None:
        """Wait for an earlier save, then stage and hand over; with `wait` return only when it is acknowledged."""
        self._wait(None)
        self._hand_over(snapshot, best)
        if wait:
            self._wait(None)

    def flush(self, *, deadline_seconds: float) -> bool:
        """Wait for the save in flight; return whether none is in flight any more."""
        return self._wait(deadline_seconds)

    def poll(self) -> None:
        """Take note of what the uploader reported, and raise its failure. Costs microseconds: call it at every step."""
        self._wait(0)

    @property
    def committed(self) -> int | None:
        """Return the last step that was acknowledged to this publisher, as of the last call of another method."""
        return self._committed

    @property
    def in_flight(self) -> int | None:
        """Return the step being uploaded, as of the last call of another method."""
        return self._in_flight

    @property
    def skipped(self) -> int:
        """Return how often `try_save` found the uploader busy."""
        return self._skipped

    @property
    def saved(self) -> Saved | None:
        """Return the last acknowledged save with its measured times."""
        return self._saved

    def close(self, *, deadline_seconds: float = 600.0) -> bool:
        """Finish the save in flight, end the uploader, remove the staging folder; return whether all was acknowledged.

        An upload that is not finished at the deadline is broken off. Raises what `flush` raises, after cleaning up.
        Closing again does nothing.
        """
        if self._connection.closed:
            return self._in_flight is None
        try:
            return self._wait(deadline_seconds)
        finally:
            self._end(_END_SECONDS if self._in_flight is None else 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            self.close()
            return
        try:
            self.close(deadline_seconds=_CRASH_SECONDS)
        except TrainerError as error:
            value.add_note(f"and the checkpoint in flight failed: {error}")

    def _hand_over(self, snapshot: Snapshot, best: tuple[str, float] | None) -> None:
        begun = self._monotonic()
        names = self._staging.stage(snapshot)
        self._stall_seconds = self._monotonic() - begun
        try:
            self._connection.send(Job(snapshot.step, self._staging.folder, names, best))
        except OSError as error:
            raise self._died() from error
        self._in_flight, self._best = snapshot.step, best

    def _wait(self, seconds: float | None) -> bool:
        """Handle reports until nothing is in flight or the time is over; what has arrived is always handled."""
        deadline = None if seconds is None or math.isinf(seconds) else self._monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - self._monotonic())
            try:
                if not self._connection.poll(left if self._in_flight is not None else 0):
                    return self._in_flight is None
                report = self._connection.recv()
            except (EOFError, OSError) as error:
                raise self._died() from error
            self._note(report)

    def _note(self, report: object) -> None:
        if isinstance(report, Committed):
            self._committed, self._in_flight = report.entry.step, None
            self._saved = Saved(report.entry, self._stall_seconds, report.upload_seconds, report.size_bytes, self._best)
        elif isinstance(report, Failed):
            self._in_flight = None
            raise report.error
        elif isinstance(report, Warned):
            self._warn(report.text)

    def _died(self) -> UploaderDied:
        if self._connection.closed:
            return UploaderDied("publish: this publisher was closed; make a new one")
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        how = "without an exit code" if code is None else f"with exit code {code}"
        if code is not None and code < 0:
            how = f"by {signal.Signals(-code).name}"
        lost = "" if self._in_flight is None else f"; step {self._in_flight} was not acknowledged"
        self._in_flight = None
        return UploaderDied(
            f"the process that uploads checkpoints ended {how}{lost}; the last acknowledged step is {self._committed}. "
            "Its log says why; SIGKILL mostly means that the pod is short of memory"
        )

    def _end(self, grace_seconds: float) -> None:
        """End the uploader and free everything; harmless when it was done before."""
        atexit.unregister(self._end)
        self._connection.close()  # an idle uploader ends at that, a busy one when it has finished
        self._process.join(grace_seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._resources.close()
