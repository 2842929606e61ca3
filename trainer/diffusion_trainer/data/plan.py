"""The plan: which images make up which optimizer step. A pure function of (lock, seed, step)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diffusion_api.dataset import Captions
from diffusion_trainer.data.captions import CaptionVariants
from diffusion_trainer.data.lock import DatasetLock, LockedImage, Shape
from diffusion_trainer.rng import Purpose, stream

_EPOCHS_REMEMBERED = 2


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of one batch: `image` indexes `lock.images`, `variant` its cached crops and flips.

    `caption` is what it is trained with, "" where it is dropped; `weight` that of its loss.
    """

    step: int
    slot: int
    epoch: int
    image: int
    variant: int
    drop_caption: bool
    caption: str
    weight: float = 1.0


class Plan:
    """Batches of constant size, each of one bucket, in an order that differs from epoch to epoch.

    Every training image is used at least once in every epoch, images of heavier concepts as much more often as their
    weight is higher than the lowest: of a fraction, another part of the images in each epoch is used once more. The
    last short batch of a bucket is filled up with further images of the same bucket.

    Where there are class images (DreamBooth, arXiv 2208.12242), every other slot of each batch has one, all of them
    equally often; an epoch is one of the instance images. The loss of a batch is then mean(instance) +
    `prior_loss_weight` * mean(class), as in the paper and in diffusers.

    Only what was asked for is computed, so resuming at a step costs nothing.
    """

    def __init__(  # noqa: PLR0913 - what decides a plan
        self,
        lock: DatasetLock,
        *,
        batch_size: int,
        seed: int,
        variants: int = 1,
        caption_dropout: float | Sequence[float] = 0.0,
        captions: CaptionVariants | None = None,
        prior_loss_weight: float = 1.0,
    ) -> None:
        """Plan for `batch_size` images per optimizer step over all processes. The lock must have a training image.

        `captions` gives those of the `variants` of each image; without it each has its own. `caption_dropout` is the
        probability of the empty one, of all images or by their concept.

        Raises ValueError where that, or an even batch for class images, is not given.
        """
        if batch_size < 1 or variants < 1:
            raise ValueError(f"Plan: batch_size {batch_size} and variants {variants} must be at least 1")
        self.lock = lock
        self.batch_size = batch_size
        self.seed = seed
        self._variants = variants
        self._captions = captions or CaptionVariants(Captions(), variants=variants, seed=seed)
        self._caption_dropout = caption_dropout
        self._buckets = self._members("instance")
        self._class_images = self._members("class")
        if not self._buckets:
            raise ValueError("Plan: the lock has no image to train on")
        self._own = batch_size
        self._weights = (1.0, 1.0)
        if self._class_images:
            if batch_size % 2 or not self._buckets.keys() <= self._class_images.keys():
                raise ValueError("Plan: with class images the batch must be even and every bucket have some")
            self._own = batch_size // 2
            self._weights = (2.0, 2.0 * prior_loss_weight)  # means over halves of the batch, from a mean over all of it
        self._lowest = min(lock.images[i].weight for members in self._buckets.values() for i in members)
        self._epochs: dict[int, list[tuple[int, ...]]] = {}

    def _members(self, role: str) -> dict[Shape, list[int]]:
        members: dict[Shape, list[int]] = {}
        for index in self.lock.training:
            if self.lock.images[index].role == role:
                members.setdefault(self.lock.images[index].bucket, []).append(index)
        return members

    @cached_property
    def batches_per_epoch(self) -> int:
        """Return the optimizer steps of one epoch."""
        return sum(-(-len(self._turns(0, members)) // self._own) for members in self._buckets.values())

    def batch(self, step: int) -> tuple[Slot, ...]:
        """Return the slots of an optimizer step (from 0), `batch_size` of them, all of one bucket."""
        if step < 0:
            raise ValueError(f"Plan: step {step} is negative")
        epoch, position = divmod(step, self.batches_per_epoch)
        images = self._epoch(epoch)[position]
        return tuple(self._slot(step, slot, epoch, image) for slot, image in enumerate(images))

    def _slot(self, step: int, slot: int, epoch: int, image: int) -> Slot:
        locked, variant = self.lock.images[image], self._variant(epoch, image)
        dropped = self._drops_caption(step, slot, self._dropout_of(locked))
        return Slot(
            step=step,
            slot=slot,
            epoch=epoch,
            image=image,
            variant=variant,
            drop_caption=dropped,
            caption="" if dropped else self._captions.of(locked)[variant],
            weight=self._weights[locked.role == "class"],
        )

    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_REMEMBERED:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._batches(epoch)
        return self._epochs[epoch]

    def _batches(self, epoch: int) -> list[tuple[int, ...]]:
        batches: list[tuple[int, ...]] = []
        for shape, members in sorted(self._buckets.items()):
            numbers = stream(self.seed, Purpose.ORDER, epoch, *shape)
            order = numbers.permutation(np.asarray(self._turns(epoch, members))).tolist()
            full = [tuple(order[i : i + self._own]) for i in range(0, len(order), self._own)]
            full[-1] = self._filled(full[-1], members, numbers)
            if self._class_images:
                first = epoch * len(full)
                full = [self._with_class(batch, shape, first + i) for i, batch in enumerate(full)]
            batches += full
        turns = stream(self.seed, Purpose.BATCH_ORDER, epoch).permutation(len(batches))
        return [batches[turn] for turn in turns]

    def _turns(self, epoch: int, members: Sequence[int]) -> list[int]:
        """Return the images of a bucket as often as this epoch uses them; how many that are, is always the same."""
        by_weight: dict[float, list[int]] = {}
        for image in members:
            by_weight.setdefault(self.lock.images[image].weight / self._lowest, []).append(image)
        turns: list[int] = []
        for weight, images in sorted(by_weight.items()):
            turns += images * math.floor(weight)
            if more := round(len(images) * (weight - math.floor(weight))):
                ranked = sorted(images, key=lambda image: self._turn(epoch, image))
                turns += ranked[:more]
        return sorted(turns)

    def _turn(self, epoch: int, image: int) -> float:
        return stream(self.seed, Purpose.REPEATS, epoch, self.lock.images[image].id).random()

    def _with_class(self, batch: tuple[int, ...], shape: Shape, number: int) -> tuple[int, ...]:
        """Return the batch with a class image after each of its own; `number` counts the batches of a bucket."""
        members = self._class_images[shape]
        result: list[int] = []
        for place, image in enumerate(batch, start=number * self._own):
            cycle, position = divmod(place, len(members))
            order = stream(self.seed, Purpose.CLASS_ORDER, cycle, *shape).permutation(len(members))
            result += [image, members[order[position]]]
        return tuple(result)

    def _filled(self, batch: tuple[int, ...], members: list[int], numbers: np.random.Generator) -> tuple[int, ...]:
        """Return the batch with its free slots given to members of its bucket, first those that it does not have."""
        missing = self._own - len(batch)
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

    def _dropout_of(self, image: LockedImage) -> float:
        given = self._caption_dropout
        return given[image.concept] if isinstance(given, Sequence) else given

    def _drops_caption(self, step: int, slot: int, probability: float) -> bool:
        if probability == 0:
            return False
        return bool(stream(self.seed, Purpose.CAPTION_DROPOUT, step, slot).random() < probability)
