"""One optimizer step: gradients of its micro-batches, their sum over all processes, the update, the average.

Also what may go wrong in it without anything being lost: memory that is short, and losses that are no numbers.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_api.memory import STATE_BYTES
from diffusion_trainer import data, fitting, optim
from diffusion_trainer.data import Batch, Plan, Share
from diffusion_trainer.errors import Diverged, GpuOutOfMemory
from diffusion_trainer.guard import LAG, RollBack, Streak
from diffusion_trainer.peers import Peers
from diffusion_trainer.preparation import Ready
from diffusion_trainer.state import Trained

LOG = logging.getLogger(__name__)
_IMAGES_NAMED = 4
_TOO_LARGE = (
    "a single image does not fit into the GPU's memory: lower dataset.resolution, set training.gradientCheckpointing: "
    "Always, or use a larger GPU"
)


@dataclass(frozen=True)
class Taken:
    """A step that was taken: `loss` of the whole batch and `norm` of its gradients are still on the device.

    So are `shares` [batchSize], the shares of each image in the loss, whichever process had it.
    """

    loss: Tensor
    norm: Tensor
    learning_rate: float
    shares: Tensor


class Stepper:
    """Takes the steps of a run. All processes call it alike.

    `micro_batch_size` may become smaller on the way; `tell` is called with a sentence about it, and the size.
    """

    def __init__(self, spec: TrainerSpec, ready: Ready, *, peers: Peers, tell: Callable[[str, int], None]) -> None:
        self._spec = spec
        self._ready = ready
        self._guard = ready.trained.guard
        self._peers = peers
        self._tell = tell
        self._shares: deque[tuple[int, Tensor]] = deque(maxlen=LAG + 1)
        self.micro_batch_size = ready.share.micro_batch_size

    def take(self, batches: Sequence[Batch], step: int) -> Taken:
        """Take the step that follows `step` optimizer steps, with this process's micro-batches.

        Raises:
            GpuOutOfMemory: not even single images fit.
            RollBack, Diverged: too many steps in a row had a loss or gradients that are no numbers.

        """
        trained, training = self._ready.trained, self._spec.training
        shares = self._summed(batches, step)
        self._shares.append((step + 1, shares))
        loss = shares.sum()
        schedule, total = training.lr_schedule, self._ready.extent.total_steps
        rate = optim.lr_at(step, schedule, peak=self._spec.learning_rate, total_steps=total) * self._guard.factor
        update = optim.apply_update(
            trained.optimizer,
            learning_rate=rate,
            max_grad_norm=training.optimizer.max_grad_norm,
            loss=loss,
            scale=trained.scale,
        )
        if trained.average is not None:
            trained.average.update(step + 1)
        self._guard.note(step + 1, update.broken)
        if streak := self._guard.streak():
            raise self._too_many(streak)
        return Taken(loss, update.norm, rate, shares)

    def finish(self) -> None:
        """Look at the last steps, too. Raises `RollBack`, `Diverged`."""
        if streak := self._guard.streak(lag=0):
            raise self._too_many(streak)

    def _summed(self, batches: Sequence[Batch], step: int) -> Tensor:
        """Leave the gradients of the whole batch, and return the shares of its images in the loss.

        Where memory is short for any process, all halve their micro-batches and compute the same batch again.
        """
        shares = self._computed(batches)
        while self._peers.agree(shares is None):
            self._ready.trained.optimizer.zero_grad(set_to_none=True)
            fitting.release()
            self._halve(step)
            shares = self._computed(batches)
        if shares is None:
            raise RuntimeError("the processes agreed that all of them have a loss")
        return added_up(shares, self._ready.trained, self._peers)

    def _computed(self, batches: Sequence[Batch]) -> Tensor | None:
        """Return the shares of this process's images, the gradients being there; None where memory is short."""
        try:
            return gradients(cut(batches, self.micro_batch_size), self._ready)
        except RuntimeError as error:
            if not fitting.is_shortage(error):
                raise
            LOG.warning("out of memory with micro-batch %d: %s", self.micro_batch_size, str(error).partition("\n")[0])
        return None

    def _halve(self, step: int) -> None:
        before, share = self.micro_batch_size, self._ready.extent.batch_size // self._peers.world_size
        size = fitting.divisor(share, before // 2)
        if not size:
            raise GpuOutOfMemory(_TOO_LARGE)
        self.micro_batch_size = size
        self._tell(f"step {step + 1} did not fit into the GPU's memory: micro-batch {size} instead of {before}", size)

    def _too_many(self, streak: Streak) -> Diverged | RollBack:
        """Return what becomes of the run after so many steps without numbers."""
        training = self._spec.training
        steps = "steps in a row were" if streak.length > 1 else "step was"
        kind = RollBack if self._guard.may_go_back else Diverged
        return kind(
            f"{streak.length} {steps} skipped, up to step {streak.step}, for loss or gradients were no finite numbers: "
            f"lower training.learningRate (it was {self._spec.learning_rate * self._guard.factor:.3g} at its peak)"
            f"{', use mixedPrecision BF16' if training.mixed_precision == 'FP16' else ''} or raise "
            f"lrSchedule.warmupSteps; {blamed(self._ready.plan, streak.step, dict(self._shares)[streak.step])}"
        )


def blamed(plan: Plan, step: int, shares: Tensor) -> str:
    """Say which images of a step (from 1) had no finite share in its loss. Waits for the device."""
    images = [plan.lock.images[slot.image].key for slot in plan.batch(step - 1)]
    lost = [image for image, share in zip(images, shares.tolist(), strict=True) if not math.isfinite(share)]
    if not lost:
        return f"the loss of each image was finite in step {step}, only the gradients were not"
    few = ", ".join(lost[:_IMAGES_NAMED]) + (f" and {len(lost) - _IMAGES_NAMED} more" * (len(lost) > _IMAGES_NAMED))
    if len(lost) == len(images):
        return f"no image of step {step} had a finite loss: {few}"
    return f"look at the images whose loss was not finite in step {step}: {few}"


def cut(batches: Iterable[Batch], size: int) -> list[Batch]:
    """Return micro-batches of at most `size` images, made of larger ones."""
    return [piece for batch in batches for piece in batch.cut(size)]


def gradients(batches: Sequence[Batch], ready: Ready) -> Tensor:
    """Add up the gradients of one optimizer step; return the shares of its images in the loss, still on the device.

    Every image weighs 1 / batchSize, so the sum over micro-batches is the batch's mean however it is cut up. With a
    loss scale the gradients are larger by it, the loss is not.
    """
    found, scale = [], ready.trained.scale
    for waiting in batches:
        batch = waiting.to(ready.device.torch)
        weights = ready.objective.weights(batch.times) * batch.weights
        shares = weights * ready.errors(batch) / ready.extent.batch_size
        loss = shares.sum()
        (loss if scale is None else loss * scale.value).backward()
        found.append(shares.detach())
    return torch.cat(found)


def added_up(shares: Tensor, trained: Trained, peers: Peers) -> Tensor:
    """Replace the gradients by their sums over all processes; return the shares of the whole batch.

    Every process has weighed its images by 1 / batchSize, so sums are what one process would have got. Of the batch it
    has the part that its rank says, in order (`data.Share`).
    """
    if peers.world_size == 1:
        return shares
    mine = len(shares)
    everybodys = shares.new_zeros(peers.world_size * mine)
    everybodys[peers.rank * mine : (peers.rank + 1) * mine] = shares
    peers.add_up([*(p.grad for p in trained.parameters.values() if p.grad is not None), everybodys])
    return everybodys


def fitting_share(spec: TrainerSpec, ready: Ready, peers: Peers) -> Share:
    """Return the largest micro-batches that fit, where the job leaves that to be found out.

    Forward and backward passes on the largest pictures show it, with as much memory taken as the optimizer is going to
    need. All processes try together, and what does not fit one of them fits none. On a CPU there is nothing to find.
    """
    if spec.training.micro_batch_size != "Auto" or not fitting.is_limited(ready.device.torch):
        return ready.share

    tries = itertools.count()

    def fits(size: int) -> bool:
        found = fitting.fits(lambda: _probe(spec, ready, size, peers))
        ready.trained.optimizer.zero_grad(set_to_none=True)
        name = f"micro-batch/{next(tries)}"
        return bool(peers.as_leader_says(name, all(peers.gather(f"{name}/each", [found]))))

    share = ready.extent.batch_size // peers.world_size
    size = fitting.largest_that_fits(share, ready.share.micro_batch_size, fits)
    if not size and spec.training.gradient_checkpointing == "Auto":
        LOG.info("a single image does not fit: computing activations again in the backward pass")
        fitting.set_recomputing(ready.attached.modules, on=True)
        size = fitting.largest_that_fits(share, ready.share.micro_batch_size, fits)
    if not size:
        raise GpuOutOfMemory(_TOO_LARGE)
    return replace(ready.share, micro_batch_size=size)


def _probe(spec: TrainerSpec, ready: Ready, size: int, peers: Peers) -> None:
    """Compute gradients of one micro-batch of the largest pictures, with the memory of a later step taken."""
    step = _step_of_largest_pictures(ready.plan)
    (batches,) = data.open_loader(
        ready.plan,
        ready.cache,
        steps=range(step, step + 1),
        share=Share(size, peers.rank, peers.world_size),
        objective=ready.objective,
    )
    trained = ready.trained
    count = 0 if trained.optimizer.state else sum(p.numel() for p in trained.parameters.values())
    moments = int(count * STATE_BYTES[spec.training.optimizer.name])
    taken = torch.empty(moments, dtype=torch.uint8, device=ready.device.torch)
    gradients(batches[:1], ready)
    del taken


def _step_of_largest_pictures(plan: Plan) -> int:
    """Return the first step of a batch from the bucket with the most pixels."""
    trained = [plan.lock.images[image] for image in plan.lock.training]
    # A batch has the shape of its own images; class images may have others, which are left aside then.
    largest = max(math.prod(image.bucket) for image in trained if image.role == "instance")
    return next(
        step
        for step in range(plan.batches_per_epoch)
        if math.prod(plan.lock.images[plan.batch(step)[0].image].bucket) == largest
    )
