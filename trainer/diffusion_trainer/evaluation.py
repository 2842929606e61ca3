"""Evaluations on the way: loss on the held-out images, and the sample grid."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion_api import names
from diffusion_api.job import TrainerSpec
from diffusion_trainer.cache import Cache
from diffusion_trainer.courier import Courier
from diffusion_trainer.curves import Curves, Evaluation
from diffusion_trainer.data import Batch, DatasetLock
from diffusion_trainer.methods import Attached
from diffusion_trainer.models import Family
from diffusion_trainer.objective import Objective
from diffusion_trainer.peers import Peers
from diffusion_trainer.sampling import sample_grid
from diffusion_trainer.stopping import StopSignal, Yielded
from diffusion_trainer.validation import ValidationResult, validate

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the weights in memory. Nothing that it does changes the training.

    `errors` gives the unweighted loss of each image of a batch; results go to `curves` and, as pictures, to `courier`.
    All processes take part in the loss; the leader alone has results and draws samples.
    """

    spec: TrainerSpec
    lock: DatasetLock
    cache: Cache
    family: Family
    attached: Attached
    errors: Callable[[Batch], Tensor]
    objective: Objective
    batch_size: int
    total_steps: int
    curves: Curves
    courier: Courier
    stop: StopSignal
    report: Callable[[str], None]
    peers: Peers

    def due(self, step: int) -> bool:
        """Return whether the weights after `step` are to be evaluated, and have not been."""
        wanted = bool(self.lock.held_out or self.spec.validation.prompts)
        on_turn = step > 0 and (step % self.spec.validation.every_steps == 0 or step == self.total_steps)
        return wanted and on_turn and self.curves.evaluated < step

    def evaluate_when_due(self, step: int) -> None:
        """Evaluate the weights after `step` when they are due; a stop leaves all of it to the next attempt."""
        if not self.due(step) or self.peers.agree(self.stop.requested):
            return
        # Each pass through the denoiser is a sign of life: an evaluation may take longer than a hang may.
        alive = self.family.denoiser.register_forward_pre_hook(lambda *_: self.report(f"evaluating step {step}"))
        try:
            with self.stop.cut_short(), self.attached.evaluating():
                self._evaluate(step)
        except Yielded:
            LOG.info("told to stop: the next attempt evaluates step %d", step)
        finally:
            alive.remove()
        self.report("")

    def _evaluate(self, step: int) -> None:
        result = validate(
            self.lock,
            self.cache,
            self.errors,
            objective=self.objective,
            seed=self.spec.training.seed,
            batch_size=self.batch_size,
            device=self.family.device,
            part=self.peers.part,
            gather=lambda losses: self.peers.gather(f"validation/{step}", losses),
        )
        with self.peers.leader_first(f"evaluation/{step}"):
            if self.peers.leads:
                self._publish(step, result)
        self.curves.evaluated = step

    def _publish(self, step: int, result: ValidationResult | None) -> None:
        if prompts := self.spec.validation.prompts:
            side = self.spec.dataset.resolution
            grid = sample_grid(self.family, prompts, size=(side, side), text=self.attached.text)
            self.courier.send(f"{names.SAMPLES_PREFIX}step-{step:08d}.png", grid.grid_png())
        if result is not None:
            self.curves.evaluations.append(Evaluation(step, result.loss, result.by_bin))
            LOG.info("step %d validation_loss %.5f on %d images", step, result.loss, result.images)
