"""What is written down of a run on its way: curves, progress, checkpoints. By rank 0 alone; the others keep step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from torch import Tensor

from diffusion_trainer.curves import Curves
from diffusion_trainer.data import Plan
from diffusion_trainer.guard import Guard
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.overfitting import best
from diffusion_trainer.progress import Board
from diffusion_trainer.reporting import Reporter
from diffusion_trainer.saving import Saver
from diffusion_trainer.settings import Failpoint
from diffusion_trainer.stepping import Taken, blamed
from diffusion_trainer.tracking import Tracking


@dataclass(frozen=True)
class Stepped:
    """An optimizer step that was taken, and how long its images had to be waited for."""

    step: int
    taken: Taken
    wait_seconds: float


@dataclass(frozen=True)
class Books:
    """Those of a process that only computes: its step is on the board, and that is a sign of life."""

    board: Board

    def begin(self, step: int) -> None:
        """Save the beginning, where the run may have to go back to it."""

    def note(self, done: Stepped) -> None:
        """Take note of a step, without waiting for the device."""
        self.board.update(step=done.step)

    def close(self, step: int) -> None:
        """Report and save what is due after a step."""

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
    guard: Guard
    shares: dict[int, Tensor] = field(default_factory=dict)
    """Those of the images in the losses that are not settled yet, by step; on the device."""

    def begin(self, step: int) -> None:  # noqa: D102
        if step == 0 and self.guard.may_go_back:
            self.saver.save_beginning()

    def note(self, done: Stepped) -> None:  # noqa: D102
        taken = done.taken
        self.curves.note(done.step, loss=taken.loss, learning_rate=taken.learning_rate, grad_norm=taken.norm)
        self.shares[done.step] = taken.shares
        self.reporter.stepped(done.step, wait_seconds=done.wait_seconds, now=time.time())

    def close(self, step: int) -> None:  # noqa: D102
        evaluated = bool(step) and self.curves.evaluated == step
        saving = self.saver.due(step)
        if saving or evaluated or self.reporter.due(step):
            self._settle()  # the only wait for the device: losses as numbers
            self.reporter.report(step, self.curves)
        if (saving or evaluated) and not self.guard.calm:
            saving = False  # it would hold weights that lead to no numbers
        elif evaluated and self.saver.keep_best(step, best(self.curves.evaluations)):
            saving = True
        elif saving:
            self.saver.save(step)
        if saving:
            self.tracking.publish()
            self.failpoint.hit("checkpoint", step)
        self.saver.announce()

    def give_way(self, step: int, *, seconds_left: float) -> None:  # noqa: D102
        self._settle()
        if self.guard.calm:
            self.saver.give_way(step, seconds_left=seconds_left)

    def finish(self, step: int) -> None:  # noqa: D102
        self._settle()
        self.saver.save(step, wait=True)
        self.tracking.publish()

    def _settle(self) -> None:
        fresh = self.curves.settle()
        lost = [point for point in fresh if not math.isfinite(point.loss)]
        self.metrics.nonfinite_loss.inc(len(lost))
        self.metrics.skipped_steps.inc(sum(point.skipped for point in fresh))
        if lost:
            step, loss = lost[0].step, lost[0].loss
            images = blamed(self.plan, step, self.shares[step])
            self.board.warn(f"step {step} changed nothing, for its loss was {loss}: {images}")
        self.shares.clear()
