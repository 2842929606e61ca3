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
WINDOW_STEPS, WINDOW_SECONDS = 20, 60.0
"""What a look at waiting takes at least: less may be one page that was read from a disk."""
MOST_WAITING = 0.02
"""Share of the time that steps may wait for their data before a user is told."""


def slow_data(*, step: int, steps: int, seconds: float, waited: float) -> str | None:
    """Return what to tell of the `steps` up to `step`, which took `seconds` and of these `waited` for their data.

    "" where there is nothing to tell, None where that is too little to judge by.
    """
    if steps < WINDOW_STEPS or seconds < WINDOW_SECONDS:
        return None
    share = waited / seconds
    if share <= MOST_WAITING:
        return ""
    return (
        f"step {step}: the last {steps} steps waited for data {share:.0%} of the time: more CPU (perGpu.cpu of the "
        "profile), more loader processes (DIFFUSION_LOADER_WORKERS in podOverrides.env) or a faster disk under "
        "/work would make the run shorter"
    )


@dataclass(frozen=True)
class Extent:
    """How long the run is: optimizer steps, of which how many make an epoch, and images per step."""

    total_steps: int
    steps_per_epoch: int
    batch_size: int


@dataclass
class _Window:
    """The steps after `first_step`, and for how many seconds they have waited for data."""

    first_step: int
    began: float
    waited: float = 0.0


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
        self._window = _Window(start_step, self._started)
        self._told_of_waiting = False
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
        self._window.waited += wait_seconds
        self._look_at_waiting(step, seconds)

    def _look_at_waiting(self, step: int, seconds: float) -> None:
        """Warn once when steps wait for data, one window after the other."""
        window = self._window
        taken, passed = step - window.first_step, seconds - window.began
        sentence = slow_data(step=step, steps=taken, seconds=passed, waited=window.waited)
        if sentence is None:
            return
        self._window = _Window(step, seconds)
        if sentence and not self._told_of_waiting:
            self._told_of_waiting = True
            self._board.warn(sentence)

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
