"""Turns what the loop sees into progress, metrics and log lines. Reads the device only when a report is due."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from diffusion_api.status import Progress
from diffusion_trainer.curves import Curves
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.progress import Board

LOG = logging.getLogger(__name__)
REPORT_STEPS, LEAST_SECONDS, MOST_SECONDS = 10, 1.0, 10.0


@dataclass(frozen=True)
class Extent:
    """How long the run is: optimizer steps, of which how many make an epoch, and images per step."""

    total_steps: int
    steps_per_epoch: int
    batch_size: int


class Reporter:
    """Reports the first step, then every ten, but not more often than every second nor more seldom than every ten."""

    def __init__(
        self,
        board: Board,
        metrics: Metrics,
        *,
        extent: Extent,
        start_step: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._metrics = metrics
        self._extent = extent
        self._monotonic = monotonic
        self._start_step = self._reported_step = start_step
        self._started = self._reported = self._last_step = monotonic()
        metrics.total_steps.set(extent.total_steps)

    def stepped(self, step: int, *, wait_seconds: float, now: float) -> None:
        """Count one optimizer step that ended at `now` (wall clock) after waiting for its batch."""
        seconds = self._monotonic()
        self._metrics.step.set(step)
        self._metrics.last_step.set(now)
        self._metrics.samples.inc(self._extent.batch_size)
        self._metrics.data_wait.inc(wait_seconds)
        self._metrics.step_duration.observe(seconds - self._last_step)
        self._last_step = seconds
        self._board.update(step=step)

    def due(self, step: int) -> bool:
        """Return whether it is time to read the loss from the device."""
        passed = self._monotonic() - self._reported
        many = step - self._reported_step >= REPORT_STEPS and passed >= LEAST_SECONDS
        return many or passed >= MOST_SECONDS or step in {self._start_step + 1, self._extent.total_steps}

    def report(self, step: int, curves: Curves) -> None:
        """Publish what the curves say of the steps since the last report, `step` being the newest."""
        now = self._monotonic()
        fresh = curves.since(self._reported_step)
        self._reported_step, self._reported = step, now
        if not fresh:
            return
        rate = (step - self._start_step) / max(now - self._started, 1e-9)
        loss = sum(point.loss for point in fresh) / len(fresh)
        progress = self._progress(step, loss, learning_rate=fresh[-1].learning_rate, curves=curves, rate=rate)
        self._metrics.epoch.set(progress.epoch)
        self._metrics.loss.set(loss)
        if curves.evaluations:
            self._metrics.validation_loss.set(curves.evaluations[-1].loss)
        for name, value in (curves.scores[-1].named() if curves.scores else {}).items():
            getattr(self._metrics, name).set(value)
        self._metrics.learning_rate.set(fresh[-1].learning_rate)
        self._metrics.grad_norm.set(fresh[-1].grad_norm)
        self._board.update(progress=progress)
        LOG.info(
            "step %d/%d loss %.5f lr %.3e grad_norm %.4f images/s %.2f",
            *(step, self._extent.total_steps, loss, fresh[-1].learning_rate, fresh[-1].grad_norm),
            progress.samples_per_second,
        )

    def _progress(self, step: int, loss: float, *, learning_rate: float, curves: Curves, rate: float) -> Progress:
        extent = self._extent
        return Progress(
            step=step,
            total_steps=extent.total_steps,
            epoch=step // extent.steps_per_epoch,
            percentage=100 * step // extent.total_steps,
            estimated_remaining_seconds=round((extent.total_steps - step) / rate),
            samples_per_second=round(rate * extent.batch_size, 3),
            loss=loss,
            validation_loss=curves.evaluations[-1].loss if curves.evaluations else None,
            clip_score=curves.scores[-1].clip_score if curves.scores else None,
            kid=curves.scores[-1].kid if curves.scores else None,
            learning_rate=learning_rate,
            last_updated_time=self._board.now(),
        )
