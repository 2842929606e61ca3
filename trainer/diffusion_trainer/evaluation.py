"""Evaluations on the way: loss on the held-out images, the sample grid, and scores of pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, partial

from PIL import Image
from torch import Tensor

from diffusion_api import names
from diffusion_api.job import TrainerSpec
from diffusion_trainer import overfitting
from diffusion_trainer.cache import Cache
from diffusion_trainer.courier import Courier
from diffusion_trainer.curves import Curves, Evaluation, Scored
from diffusion_trainer.data import Batch, DatasetLock
from diffusion_trainer.methods import Attached
from diffusion_trainer.models import Family
from diffusion_trainer.objective import Objective
from diffusion_trainer.peers import Peers
from diffusion_trainer.sampling import sample_grid
from diffusion_trainer.scoring.drawing import pictures_of
from diffusion_trainer.scoring.scorer import Scorer
from diffusion_trainer.stopping import StopSignal, Yielded
from diffusion_trainer.validation import ValidationResult, train_subset, validate

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the weights in memory. Nothing that it does changes the training.

    `shown` puts the weights to evaluate in place for a while.
    `errors` gives the unweighted loss of each image of a batch; results go to `curves` and, as pictures, to `courier`.
    All processes take part in the loss and draw a part of the pictures; all know the results, and the leader alone
    has the pictures.
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
    warn: Callable[[str], None]
    shown: Callable[[], AbstractContextManager[None]]
    peers: Peers
    scorer: Scorer | None = None

    def due(self, step: int) -> bool:
        """Return whether the weights after `step` are to be evaluated, and have not been."""
        on_turn = step > 0 and (step % self.spec.validation.every_steps == 0 or step == self.total_steps)
        if not on_turn or self.curves.evaluated >= step:
            return False  # which is how it mostly is: a large lock is not searched at every step
        return bool(self.spec.validation.prompts or self.lock.held_out)

    @cached_property
    def _beside(self) -> tuple[int, ...]:
        """The training images that are measured, too. To rank them takes a second of 100,000."""
        return train_subset(self.lock, seed=self.spec.training.seed, most=self.spec.validation.measured_images)

    @property
    def stopped_after(self) -> int | None:
        """Return the step after which early stopping ends the run, None while it goes on, and where all is done."""
        stopped = overfitting.stops_after(self.curves.evaluations, self.spec.validation.early_stopping)
        return None if stopped == self.total_steps else stopped

    @property
    def stops_early(self) -> bool:
        """Return whether early stopping ends the run here."""
        return self.stopped_after is not None

    def evaluate_when_due(self, step: int) -> None:
        """Evaluate the weights after `step` when they are due; a stop leaves all of it to the next attempt."""
        if not self.due(step) or self.peers.agree(self.stop.requested):
            return
        # Each pass through the denoiser is a sign of life: an evaluation may take longer than a hang may.
        alive = self.family.denoiser.register_forward_pre_hook(lambda *_: self.report(f"evaluating step {step}"))
        try:
            # In this order: nothing may cut the exchange of weights short.
            with self.shown(), self.stop.cut_short(), self.attached.evaluating():
                self._evaluate(step)
        except Yielded:
            LOG.info("told to stop: the next attempt evaluates step %d", step)
        finally:
            alive.remove()
        self.report("")

    def _evaluate(self, step: int) -> None:
        most = self.spec.validation.measured_images
        result = validate(
            self.lock,
            self.cache,
            self.errors,
            objective=self.objective,
            seed=self.spec.training.seed,
            batch_size=self.batch_size,
            device=self.family.device,
            beside=self._beside,
            most=most,
            part=self.peers.part,
            gather=lambda losses: self.peers.gather(f"validation/{step}", losses),
        )
        pictures = self._draw(step)
        scored = self._scored(self.scorer, step, pictures) if self.scorer else None
        found, scores = self.peers.as_leader_says(
            f"evaluated/{step}",
            [asdict(_evaluation(step, result)) if result else None, asdict(scored) if scored else None],
        )
        self.curves.evaluate(
            step,
            Evaluation(**found | {"by_bin": tuple(found["by_bin"])}) if found else None,
            Scored(**scores) if scores else None,
        )
        if self.peers.leads:
            self._tell(step)

    def _tell(self, step: int) -> None:
        for one in self.curves.evaluations[-1:]:
            LOG.info("step %d validation_loss %.5f train_subset_loss %s", one.step, one.loss, one.train_loss)
        for scored in self.curves.scores[-1:]:
            LOG.info("step %d %s", step, " ".join(f"{name} {value:.5g}" for name, value in scored.named().items()))
        if text := overfitting.warning(self.curves.evaluations):
            self.warn(text)

    def _draw(self, step: int) -> Sequence[Image.Image]:
        """Draw this process's part of the prompts; return the pictures of all of them to the leader."""
        prompts = self.spec.validation.prompts
        if not prompts:
            return ()
        side = self.spec.dataset.resolution
        grid = sample_grid(
            self.family,
            prompts,
            size=(side, side),
            text=self.attached.text,
            part=self.peers.part,
            gather=lambda drawn: self.peers.gather(f"samples/{step}", drawn),
        )
        if grid is None:
            return ()
        self.courier.send(f"{names.SAMPLES_PREFIX}step-{step:08d}.png", grid.grid_png())
        return grid.pictures

    def _scored(self, scorer: Scorer, step: int, pictures: Sequence[Image.Image]) -> Scored | None:
        """Return the scores to the leader, of its `pictures` of the prompts and of those that all draw here."""
        seed, text = self.spec.training.seed, self.attached.text
        draw = partial(pictures_of, family=self.family, cache=self.cache, text=text, seed=seed)
        found = self.peers.gather(f"scores/{step}", scorer.look(draw, part=self.peers.part))
        if not self.peers.leads:
            return None
        prompts = self.spec.validation.prompts
        shown = [(picture, asked.prompt) for picture, asked in zip(pictures, prompts, strict=True)]
        return scorer.conclude(step, found, shown)


def _evaluation(step: int, result: ValidationResult) -> Evaluation:
    trained = result.trained
    if trained is None:
        return Evaluation(step, result.loss, result.by_bin)
    advantage = overfitting.advantage(result.of_images, trained.of_images)
    chance = overfitting.chance(advantage, images=min(result.images, trained.images))
    return Evaluation(step, result.loss, result.by_bin, trained.loss, advantage, chance)
