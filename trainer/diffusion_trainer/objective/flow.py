"""Rectified flow: SD3 (Esser et al. 2024, arXiv 2403.03206).

x_sigma = (1 - sigma) x0 + sigma n, and the denoiser predicts the velocity n - x0. The loss is that of the velocity,
unweighted: the x0 form that other trainers use is sigma^2 times it. Sigma is continuous and fp32 all the way: as
timesteps of a list, or in bf16, half of its values would fall together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diffusion_trainer.objective.discrete import sample_losses
from diffusion_trainer.objective.drawing import Sampling, uniform_or_logit_normal


@dataclass(frozen=True, slots=True)
class FlowProcess:
    """The forward process of a flow. `shift` is the one that the model samples with; config as its scheduler's."""

    shift: float
    config: Mapping[str, Any]


def shifted(sigma: float, *, shift: float) -> float:
    """Return shift sigma / (1 + (shift - 1) sigma): more of the time at high noise for a shift above 1 (eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class FlowObjective:
    """The objective of a flow; see `objective.base.Objective`. `shift` is the one that times are drawn with."""

    shift: float
    sampling: Sampling = "LogitNormal"
    times_dtype: torch.dtype = torch.float32

    def draw(self, numbers: np.random.Generator) -> float:  # noqa: D102 - as in `Objective`; likewise below
        return shifted(uniform_or_logit_normal(numbers, self.sampling), shift=self.shift)

    def validation_times(self, bins: int) -> tuple[float, ...]:  # noqa: D102
        return tuple((number + 0.5) / bins for number in range(bins))

    def noisy(self, latents: Tensor, noise: Tensor, *, times: Tensor) -> Tensor:  # noqa: D102
        sigma = times.view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def errors(self, prediction: Tensor, latents: Tensor, noise: Tensor, *, times: Tensor) -> Tensor:  # noqa: ARG002, D102
        return sample_losses(prediction, noise - latents)

    def weights(self, times: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(times)

    def to(self, device: torch.device | str) -> Self:  # noqa: ARG002, D102 - there are no tables
        return self
