"""Diffusion in discrete timesteps: SD1, SD2, SDXL, and unconditional models.

DDPM notation (Ho et al. 2020, arXiv 2006.11239): `a` is alphas_cumprod at a timestep, x0 the latents, n the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from diffusion_trainer.objective.drawing import Sampling, uniform_or_logit_normal

Prediction = Literal["Epsilon", "VPrediction", "Sample"]
"""What a denoiser predicts, in the words of the API; Flow has no noise schedule of this kind."""


def add_noise(latents: Tensor, noise: Tensor, *, alphas: Tensor) -> Tensor:
    """Return x_t = sqrt(a) x0 + sqrt(1 - a) n. `latents` and `noise` are [B,C,H,W], `alphas` [B]."""
    a = alphas.view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def target(latents: Tensor, noise: Tensor, *, alphas: Tensor, prediction: Prediction) -> Tensor:
    """Return what the denoiser should answer: n, v = sqrt(a) n - sqrt(1 - a) x0 (arXiv 2202.00512), or x0."""
    if prediction == "Epsilon":
        return noise
    if prediction == "Sample":
        return latents
    a = alphas.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def snr(alphas: Tensor) -> Tensor:
    """Return the signal-to-noise ratio a / (1 - a)."""
    return alphas / (1 - alphas)


def without_terminal_signal(alphas: Tensor) -> Tensor:
    """Return alphas_cumprod [T], rescaled to end at 0: Lin et al. 2024, arXiv 2305.08891, algorithm 1."""
    roots = alphas.double().sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return (((roots - last) * first / (first - last)) ** 2).to(alphas.dtype)


def snr_weights(alphas: Tensor, *, gamma: float | None, prediction: Prediction) -> Tensor:
    """Return min-SNR-gamma weights (Hang et al. 2023, arXiv 2303.09556, section 3.4); 1 everywhere without gamma.

    For x0 the weight is min(SNR, gamma); the error in n is SNR times smaller, that in v SNR + 1 times.

    Where a schedule ends without any signal (`alphas` [T] has a 0), sampling begins at a timestep that would have the
    weight 0. SNR + 1 is clipped there instead: min(SNR + 1, gamma), the weight of an error in v, which was introduced
    for that very reason (Salimans and Ho 2022, arXiv 2202.00512, section 4).
    """
    if gamma is None:
        return torch.ones_like(alphas)
    ratio = snr(alphas)
    clipped = (ratio + 1 if (alphas == 0).any() else ratio).clamp(max=gamma)
    if prediction == "Sample":
        return clipped
    return clipped / (ratio if prediction == "Epsilon" else ratio + 1)


def sample_losses(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error of each sample, [B], in fp32 whatever the precision of the prediction."""
    return (prediction.float() - wanted.float()).square().flatten(1).mean(1)


@dataclass(frozen=True, slots=True)
class DiscreteProcess:
    """The forward process of a model with a noise schedule.

    alphas_cumprod: fp32 [T] on the CPU; prediction_type: what is predicted; config: of the model's noise scheduler.
    """

    alphas_cumprod: Tensor
    prediction_type: Prediction
    config: Mapping[str, Any]


@dataclass(frozen=True)
class DiscreteObjective:
    """The objective on a noise schedule; see `objective.base.Objective`. Tables have one value per timestep."""

    alphas: Tensor
    weight_of_each: Tensor
    prediction: Prediction
    sampling: Sampling = "Uniform"
    times_dtype: torch.dtype = torch.int64

    @classmethod
    def of(
        cls, alphas_cumprod: Tensor, *, prediction: Prediction, gamma: float | None, sampling: Sampling = "Uniform"
    ) -> DiscreteObjective:
        """Return the objective of a model's noise schedule `alphas_cumprod` [T]; the tables are computed in fp64."""
        alphas = alphas_cumprod.double().cpu()
        weights = snr_weights(alphas, gamma=gamma, prediction=prediction)
        return cls(alphas.float(), weights.float(), prediction, sampling)

    def draw(self, numbers: np.random.Generator) -> int:  # noqa: D102 - as in `Objective`; likewise below
        steps = len(self.alphas)
        if self.sampling == "Uniform":
            return int(numbers.integers(steps))
        return min(int(uniform_or_logit_normal(numbers, self.sampling) * steps), steps - 1)

    def validation_times(self, bins: int) -> tuple[int, ...]:  # noqa: D102
        return tuple((2 * number + 1) * len(self.alphas) // (2 * bins) for number in range(bins))

    def noisy(self, latents: Tensor, noise: Tensor, *, times: Tensor) -> Tensor:  # noqa: D102
        return add_noise(latents, noise, alphas=self.alphas[times])

    def errors(self, prediction: Tensor, latents: Tensor, noise: Tensor, *, times: Tensor) -> Tensor:  # noqa: D102
        return sample_losses(prediction, target(latents, noise, alphas=self.alphas[times], prediction=self.prediction))

    def weights(self, times: Tensor) -> Tensor:  # noqa: D102
        return self.weight_of_each[times]

    def to(self, device: torch.device | str) -> Self:  # noqa: D102
        return replace(self, alphas=self.alphas.to(device), weight_of_each=self.weight_of_each.to(device))
