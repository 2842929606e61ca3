"""The plan: which images make up which optimizer step. A pure function of (lock, seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_trainer.data.lock import DatasetLock, Shape
from diffusion_trainer.rng import Purpose, stream

_EPOCHS_REMEMBERED = 2


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of one batch: `image` indexes `lock.images`, `variant` its cached crops and flips."""

    step: int
    slot: int
    epoch: int
    image: int
    variant: int
    drop_caption: bool


class Plan:
    """Batches of constant size, each of one bucket, in an order that differs from epoch to epoch.

    Every training image is used at least once in every epoch: the last short batch of a bucket is filled up with
    further images of the same bucket. Only what was asked for is computed, so resuming at a step costs nothing.
    """

    def __init__(
        self, lock: DatasetLock, *, batch_size: int, seed: int, variants: int = 1, caption_dropout: float = 0.0
    ) -> None:
        """Plan for `batch_size` images per optimizer step over all processes. The lock must have a training image."""
        if batch_size < 1 or variants < 1:
            raise ValueError(f"Plan: batch_size {batch_size} and variants {variants} must be at least 1")
        self.lock = lock
        self.batch_size = batch_size
        self.seed = seed
        self._variants = variants
        self._caption_dropout = caption_dropout
        self._buckets: dict[Shape, list[int]] = {}
        for index in lock.training:
            self._buckets.setdefault(lock.images[index].bucket, []).append(index)
        if not self._buckets:
            raise ValueError("Plan: the lock has no image to train on")
        self._epochs: dict[int, list[tuple[int, ...]]] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Return the optimizer steps of one epoch."""
        return sum(-(-len(members) // self.batch_size) for members in self._buckets.values())

    def batch(self, step: int) -> tuple[Slot, ...]:
        """Return the slots of an optimizer step (from 0), `batch_size` of them, all of one bucket."""
        if step < 0:
            raise ValueError(f"Plan: step {step} is negative")
        epoch, position = divmod(step, self.batches_per_epoch)
        images = self._epoch(epoch)[position]
        return tuple(
            Slot(
                step=step,
                slot=slot,
                epoch=epoch,
                image=image,
                variant=self._variant(epoch, image),
                drop_caption=self._drops_caption(step, slot),
            )
            for slot, image in enumerate(images)
        )

    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_REMEMBERED:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._batches(epoch)
        return self._epochs[epoch]

    def _batches(self, epoch: int) -> list[tuple[int, ...]]:
        batches: list[tuple[int, ...]] = []
        for (width, height), members in sorted(self._buckets.items()):
            numbers = stream(self.seed, Purpose.ORDER, epoch, width, height)
            order = numbers.permutation(np.asarray(members)).tolist()
            full = [tuple(order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size)]
            full[-1] = self._filled(full[-1], members, numbers)
            batches += full
        turns = stream(self.seed, Purpose.BATCH_ORDER, epoch).permutation(len(batches))
        return [batches[turn] for turn in turns]

    def _filled(self, batch: tuple[int, ...], members: list[int], numbers: np.random.Generator) -> tuple[int, ...]:
        """Return the batch with its free slots given to members of its bucket, first those that it does not have."""
        missing = self.batch_size - len(batch)
        if not missing:
            return batch
        drawn = numbers.permutation(np.asarray(members)).tolist()
        there = set(batch)
        candidates = [image for image in drawn if image not in there] + [image for image in drawn if image in there]
        return batch + tuple(candidates[i % len(candidates)] for i in range(missing))

    def _variant(self, epoch: int, image: int) -> int:
        if self._variants == 1:
            return 0
        return int(stream(self.seed, Purpose.AUGMENTATION, epoch, self.lock.images[image].id).integers(self._variants))

    def _drops_caption(self, step: int, slot: int) -> bool:
        if self._caption_dropout == 0:
            return False
        return bool(stream(self.seed, Purpose.CAPTION_DROPOUT, step, slot).random() < self._caption_dropout)
