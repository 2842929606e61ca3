"""What the rest of the trainer knows of an objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffusion_trainer.objective.discrete import DiscreteProcess
from diffusion_trainer.objective.flow import FlowProcess

Process: TypeAlias = DiscreteProcess | FlowProcess
"""The forward process of a family: how images become noise, and what the denoiser predicts."""


class Objective(Protocol):
    """The objective of one run. Its tables lie on one device, so that no step waits; it can be pickled.

    latents, noise, predictions: [B, C, h, w]; times: [B]. All results are fp32.
    """

    @property
    def times_dtype(self) -> torch.dtype:
        """Return the dtype of times: int64 for timesteps, fp32 for sigmas."""
        ...

    def draw(self, numbers: np.random.Generator) -> float:
        """Return the time of one image, from a stream of its own."""
        ...

    def validation_times(self, bins: int) -> Sequence[float]:
        """Return the middle of each of `bins` equal parts of the process, from the least to the most noise.

        They do not depend on how times are drawn for training, so that runs can be compared.
        """
        ...

    def noisy(self, latents: Tensor, noise: Tensor, *, times: Tensor) -> Tensor:
        """Return the denoiser's input [B, C, h, w]."""
        ...

    def errors(self, prediction: Tensor, latents: Tensor, noise: Tensor, *, times: Tensor) -> Tensor:
        """Return the mean squared error of each image [B], without its weight."""
        ...

    def weights(self, times: Tensor) -> Tensor:
        """Return the weight [B] of each time."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the objective with its tables on a device."""
        ...
