"""Checkpoints as the loop sees them: when one is due, making one, and what to do when the pod must go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from diffusion_api.status import BestCheckpoint, LatestCheckpoint
from diffusion_trainer.cadence import GRACE_SHARE, Cadence, fits_grace
from diffusion_trainer.checkpoint import Entry, Publisher, Saved, Snapshot
from diffusion_trainer.curves import Evaluation
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.overfitting import METRIC
from diffusion_trainer.progress import Board, timestamp

LOG = logging.getLogger(__name__)
SLOWEST_BYTES_PER_SECOND = 10e6
"""As long as an upload of this speed may take, waiting for it is no hang: 50 minutes for the 30 GB of a whole SDXL."""
BEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Voices:
    """Where acknowledged checkpoints are announced; `root` is the URI of the job's checkpoints."""

    board: Board
    metrics: Metrics
    root: str


class Saver:
    """Saves snapshots at optimizer-step boundaries; `make` returns that of a step, with its tensors still live."""

    def __init__(  # noqa: PLR0913 - what saving depends on, and a clock
        self,
        publisher: Publisher,
        make: Callable[[int], Snapshot],
        *,
        cadence: Cadence,
        start_step: int,
        voices: Voices,
        best_step: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`best_step` is the step of the checkpoint that is pinned already, if one is."""
        self._publisher = publisher
        self._make = make
        self._cadence = cadence
        self._voices = voices
        self._monotonic = monotonic
        self._saved_step = start_step
        self._saved_at = monotonic()
        self._best_step = best_step
        self._announced: Saved | None = None
        self._bytes = 0

    def due(self, step: int) -> bool:
        """Return whether to save the state after `step`; a step is saved once."""
        if step == self._saved_step:
            return False
        last = self._publisher.saved
        return self._cadence.due(
            step,
            elapsed_seconds=self._monotonic() - self._saved_at,
            stall_seconds=last.stall_seconds if last else None,
            upload_seconds=last.upload_seconds if last else None,
        )

    def keep_best(self, step: int, best: Evaluation | None) -> bool:
        """Save and pin the state after `step` where its evaluation is the best, and is not pinned already.

        It waits for an earlier save: the best weights are never those of some step nearby.
        """
        if best is None or best.step != step or step == self._best_step:
            return False
        self._hand_over(step, best=(METRIC, best.loss))
        self._best_step = self._saved_step = step
        self._saved_at = self._monotonic()
        self.announce()
        return True

    def save_beginning(self) -> None:
        """Save the state before the first step, which is not done otherwise."""
        self._hand_over(0)

    def save(self, step: int, *, wait: bool = False) -> None:
        """Stage the state after `step`; with `wait` return only when it is acknowledged.

        While an earlier one is being uploaded, a number of steps that the user asked for waits for it; everything else
        is put off to a later step.
        """
        if step != self._saved_step:
            if wait or self._cadence.steps is not None:
                self._hand_over(step)
            elif not self._try_to_hand_over(step):
                self._voices.metrics.checkpoints.labels("skipped").inc()
                return
            self._saved_step, self._saved_at = step, self._monotonic()
        if wait:
            self._acknowledge()
        self.announce()

    def _hand_over(self, step: int, *, best: tuple[str, float] | None = None) -> None:
        """Stage the state after `step` when an earlier one is acknowledged."""
        self._acknowledge()
        snapshot = self._make(step)
        self._bytes = snapshot_bytes(snapshot)
        self._publisher.save(snapshot, best=best)

    def _try_to_hand_over(self, step: int) -> bool:
        """Stage the state after `step` and return True, unless an earlier one is not acknowledged yet."""
        snapshot = self._make(step)
        handed_over = self._publisher.try_save(snapshot)
        if handed_over:
            self._bytes = snapshot_bytes(snapshot)
        return handed_over

    def _acknowledge(self) -> None:
        """Wait until the last save is acknowledged, and show signs of life as long as that may take."""
        patient_until = self._monotonic() + self._bytes / SLOWEST_BYTES_PER_SECOND
        while not self._publisher.flush(deadline_seconds=BEAT_SECONDS):
            if self._monotonic() < patient_until:
                self._voices.board.update()

    def announce(self) -> None:
        """Raise what the uploader failed with, and tell of a checkpoint that was acknowledged. Costs microseconds."""
        self._publisher.poll()
        saved = self._publisher.saved
        if saved is None or saved is self._announced:
            return
        self._announced = saved
        metrics = self._voices.metrics
        metrics.checkpoints.labels("acknowledged").inc()
        metrics.checkpoint_duration.labels("save").observe(saved.stall_seconds)
        metrics.checkpoint_duration.labels("upload").observe(saved.upload_seconds)
        metrics.checkpoint_bytes.set(saved.size_bytes)
        metrics.last_checkpoint.set(saved.entry.time)
        self._voices.board.update(latest_checkpoint=checkpoint_of(saved.entry, root=self._voices.root))
        if saved.best is not None:
            metric, value = saved.best
            self._voices.board.update(best_checkpoint=BestCheckpoint(step=saved.entry.step, metric=metric, value=value))
        LOG.info("checkpoint of step %d acknowledged (%.1f MB)", saved.entry.step, saved.size_bytes / 1e6)

    def give_way(self, step: int, *, seconds_left: float) -> None:
        """Use what is left of the grace period: finish the upload under way, then save `step` if that should fit."""
        began = self._monotonic()
        if not self._publisher.flush(deadline_seconds=GRACE_SHARE * seconds_left):
            return
        self.announce()
        left = seconds_left - (self._monotonic() - began)
        if step == self._saved_step:
            return
        snapshot, last = self._make(step), self._publisher.saved
        upload_seconds = last.upload_seconds if last else None
        if fits_grace(seconds_left=left, upload_seconds=upload_seconds, size_bytes=snapshot_bytes(snapshot)):
            self._publisher.save(snapshot)
            self._publisher.flush(deadline_seconds=left)
            self.announce()


def checkpoint_of(entry: Entry, *, root: str) -> LatestCheckpoint:
    """Return how status and progress name a checkpoint; `root` is the URI of the job's checkpoints."""
    return LatestCheckpoint(step=entry.step, uri=f"{root}{entry.key}/", time=timestamp(entry.time))


def snapshot_bytes(snapshot: Snapshot) -> int:
    """Return the size of a snapshot's tensors."""
    return sum(t.numel() * t.element_size() for group in snapshot.tensors.values() for t in group.values())
