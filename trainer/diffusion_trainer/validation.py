"""Loss on the held-out split, with the same times and the same noise at each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch

from diffusion_api.validation import MEASURED_IMAGES
from diffusion_trainer.data.loader import Batch, CachedTensors, stacked
from diffusion_trainer.data.lock import DatasetLock
from diffusion_trainer.objective import Objective
from diffusion_trainer.rng import Purpose, stream

BINS = 8
"""Times per image, one in the middle of each eighth of the process."""
MEASURED = MEASURED_IMAGES

LossOfEach: TypeAlias = Callable[[Batch], torch.Tensor]
"""Unweighted loss of each image of a batch, fp32 [B]: mean squared error of the denoiser. Called without gradients."""
Loss: TypeAlias = tuple[int, int, float]
"""Index of the image, number of the bin, loss."""


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """`loss` is the mean over images and times; `by_bin` over images, from the least to the most noise.

    `of_images` is the mean over times of each image. `trained` is the same of training images, where some were asked
    for: their loss lies below by what does not carry over to other images.
    """

    loss: float
    by_bin: tuple[float, ...]
    of_images: tuple[float, ...]
    trained: ValidationResult | None = None

    @property
    def images(self) -> int:
        """Return how many images were measured."""
        return len(self.of_images)


@dataclass(frozen=True, slots=True)
class _Case:
    """One image (index into `lock.images`) at the time of one bin."""

    image: int
    bin: int


def validate(  # noqa: PLR0913 - what is measured, and by how many
    lock: DatasetLock,
    cache: CachedTensors,
    loss_of_each: LossOfEach,
    *,
    objective: Objective,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    beside: Sequence[int] = (),
    most: int = MEASURED,
    part: slice = slice(None),
    gather: Callable[[list[Loss]], list[Loss]] = list,
) -> ValidationResult | None:
    """Return the loss on `most` held-out images, and on the training images `beside` them; None where none is held out.

    Of several processes each does a `part` of the batches; `gather` brings together what they found, at the one that
    gets the result. It is the same, bit for bit, however many there are.

    Noise and times belong to the image (by content hash), not to its place in a batch. The latents are the
    posterior's mean, the caption is never dropped. The last batch is padded, so that all have one shape per bucket.
    """
    held_out = measured(lock, most=most)
    looked_at = (*held_out, *beside) if held_out else ()
    places = torch.tensor(objective.validation_times(BINS), dtype=objective.times_dtype)
    order: list[_Case] = []
    losses: list[torch.Tensor] = []
    with torch.no_grad():
        for cases in list(_batches(lock, looked_at, batch_size))[part]:
            padded = cases + [cases[-1]] * (batch_size - len(cases))
            batch = _batch(padded, lock, cache, seed=seed, times=places).to(device)
            losses.append(loss_of_each(batch)[: len(cases)])
            order += cases
    # One transfer, after everything was launched. Summed in one order whatever the batches were.
    values = torch.cat(losses).double().tolist() if losses else []
    pooled = gather([(case.image, case.bin, loss) for case, loss in zip(order, values, strict=True)])
    if not pooled:
        return None
    found = {_Case(image, number): loss for image, number, loss in pooled}
    result = _result(lock, held_out, found)
    return replace(result, trained=_result(lock, beside, found)) if beside else result


def measured(lock: DatasetLock, *, most: int) -> tuple[int, ...]:
    """Return the held-out images whose loss is measured, `most` or all: the first by content hash, as scores have them.

    An evaluation costs the same however large the dataset is, and all of them look at the same images.
    """
    return tuple(sorted(lock.held_out, key=lambda image: (lock.images[image].id, image))[:most])


def train_subset(lock: DatasetLock, *, seed: int, most: int = MEASURED) -> tuple[int, ...]:
    """Return as many training images as held-out ones are measured, or all: those that a keyed draw ranks first."""
    ranked = sorted(lock.instances, key=lambda i: (stream(seed, Purpose.TRAIN_SUBSET, lock.images[i].id).random(), i))
    return tuple(ranked[: min(len(lock.held_out), most)])


def _result(lock: DatasetLock, images: Sequence[int], found: Mapping[_Case, float]) -> ValidationResult:
    images = sorted(images, key=lambda image: (lock.images[image].id, image))
    by_bin = tuple(sum(found[_Case(image, number)] for image in images) / len(images) for number in range(BINS))
    of_images = tuple(sum(found[_Case(image, number)] for number in range(BINS)) / BINS for image in images)
    return ValidationResult(loss=sum(by_bin) / BINS, by_bin=by_bin, of_images=of_images)


def _batches(lock: DatasetLock, images: Sequence[int], batch_size: int) -> Iterator[list[_Case]]:
    """Yield what goes through the denoiser together, of one bucket each."""
    ordered = sorted(images, key=lambda i: (lock.images[i].bucket, lock.images[i].id, i))
    for _, group in groupby(ordered, key=lambda i: lock.images[i].bucket):
        cases = [_Case(image, number) for image in group for number in range(BINS)]
        for start in range(0, len(cases), batch_size):
            yield cases[start : start + batch_size]


def _batch(cases: list[_Case], lock: DatasetLock, cache: CachedTensors, *, seed: int, times: torch.Tensor) -> Batch:
    latents = [cache.latents(case.image, 0)[0] for case in cases]
    return Batch(
        latents=torch.stack(latents),
        noise=torch.stack([_noise(case, lock, tuple(latents[0].shape), seed) for case in cases]),
        times=times[[case.bin for case in cases]],
        conditioning=stacked([cache.text(lock.images[case.image].caption) for case in cases]),
        geometry=torch.stack([cache.geometry(case.image, 0) for case in cases]),
        weights=torch.ones(len(cases)),
    )


def _noise(case: _Case, lock: DatasetLock, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    numbers = stream(seed, Purpose.VALIDATION, lock.images[case.image].id, case.bin)
    return torch.from_numpy(numbers.standard_normal(shape, dtype=np.float32))
