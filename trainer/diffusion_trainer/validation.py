"""Loss on the held-out split, with the same timesteps and the same noise at each evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from diffusion_trainer.data.loader import Batch, CachedTensors
from diffusion_trainer.data.lock import DatasetLock

BINS = 8
"""Timesteps per image, one in the middle of each eighth of the schedule."""

LossOfEach: TypeAlias = Callable[[Batch], torch.Tensor]
"""Unweighted loss of each image of a batch, fp32 [B]: mean squared error of the denoiser. Called without gradients."""


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """`loss` is the mean over images and timesteps; `by_bin` over images, from the least to the most noise."""

    loss: float
    by_bin: tuple[float, ...]
    images: int


def validate(
    lock: DatasetLock,
    cache: CachedTensors,
    loss_of_each: LossOfEach,
    *,
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> ValidationResult | None:
    """Return the loss on the held-out split, None where there is none.

    Noise and timesteps belong to the image (by content hash), not to its place in a batch. The latents are the
    posterior's mean, the caption is never dropped. The last batch is padded, so that all have one shape per bucket.
    """
    raise NotImplementedError
