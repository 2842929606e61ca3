"""What is written down of a run on its way: curves, progress, checkpoints. By rank 0 alone; the others keep step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from torch import Tensor

from diffusion_trainer.curves import Curves, first_diverged
from diffusion_trainer.data import Plan
from diffusion_trainer.errors import Diverged
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.overfitting import best
from diffusion_trainer.progress import Board
from diffusion_trainer.reporting import Reporter
from diffusion_trainer.saving import Saver
from diffusion_trainer.settings import Failpoint
from diffusion_trainer.tracking import Tracking


@dataclass(frozen=True)
class Stepped:
    """One optimizer step; `loss` and `grad_norm` are still on the device."""

    step: int
    loss: Tensor
    learning_rate: float
    grad_norm: Tensor
    wait_seconds: float


@dataclass(frozen=True)
class Books:
    """Those of a process that only computes: its step is on the board, and that is a sign of life."""

    board: Board

    def note(self, done: Stepped) -> None:
        """Take note of a step, without waiting for the device."""
        self.board.update(step=done.step)

    def close(self, step: int) -> None:
        """Report and save what is due after a step. Raises `Diverged`."""

    def give_way(self, step: int, *, seconds_left: float) -> None:
        """Save what fits into what is left of the grace period."""

    def finish(self, step: int) -> None:
        """Save the end, and wait until it is acknowledged."""


@dataclass(frozen=True)
class LeadersBooks(Books):
    """Those of rank 0."""

    curves: Curves
    plan: Plan
    reporter: Reporter
    saver: Saver
    tracking: Tracking
    metrics: Metrics
    failpoint: Failpoint

    def note(self, done: Stepped) -> None:  # noqa: D102
        self.curves.note(done.step, loss=done.loss, learning_rate=done.learning_rate, grad_norm=done.grad_norm)
        self.reporter.stepped(done.step, wait_seconds=done.wait_seconds, now=time.time())

    def close(self, step: int) -> None:  # noqa: D102
        evaluated = bool(step) and self.curves.evaluated == step
        saving = self.saver.due(step)
        if saving or evaluated or self.reporter.due(step):
            settle(self.curves, self.plan, metrics=self.metrics)  # the only wait for the device: losses as numbers
            self.reporter.report(step, self.curves)
        if evaluated and self.saver.keep_best(step, best(self.curves.evaluations)):
            saving = True
        elif saving:
            self.saver.save(step)
        if saving:
            self.tracking.publish()
            self.failpoint.hit("checkpoint", step)
        self.saver.announce()

    def give_way(self, step: int, *, seconds_left: float) -> None:  # noqa: D102
        settle(self.curves, self.plan, metrics=self.metrics)
        self.saver.give_way(step, seconds_left=seconds_left)

    def finish(self, step: int) -> None:  # noqa: D102
        settle(self.curves, self.plan, metrics=self.metrics)
        self.saver.save(step, wait=True)
        self.tracking.publish()


def settle(curves: Curves, plan: Plan, *, metrics: Metrics) -> None:
    """Read the losses from the device. Raises `Diverged`, before anything that came of it can be saved."""
    fresh = curves.settle()
    metrics.nonfinite_loss.inc(sum(not math.isfinite(point.loss) for point in fresh))
    if bad := first_diverged(fresh):
        images = [plan.lock.images[slot.image].key for slot in plan.batch(bad.step - 1)]
        raise Diverged(
            f"the loss of step {bad.step} is {bad.loss}: lower training.learningRate (it was {bad.learning_rate:.3g}) "
            f"or raise lrSchedule.warmupSteps; the images of this step were {', '.join(images[:8])}"
        )
