"""What the denoiser is asked for, and how far off it was. Pure functions in fp32; nothing random is drawn here.

DDPM notation (Ho et al. 2020, arXiv 2006.11239): `a` is alphas_cumprod at a timestep, x0 the latents, n the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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


def snr_weights(alphas: Tensor, *, gamma: float | None, prediction: Prediction) -> Tensor:
    """Return min-SNR-gamma weights (Hang et al. 2023, arXiv 2303.09556, section 3.4); 1 everywhere without gamma.

    For x0 the weight is min(SNR, gamma); the error in n is SNR times smaller, that in v SNR + 1 times.
    """
    if gamma is None:
        return torch.ones_like(alphas)
    ratio = snr(alphas)
    clipped = ratio.clamp(max=gamma)
    if prediction == "Sample":
        return clipped
    return clipped / (ratio if prediction == "Epsilon" else ratio + 1)


def sample_losses(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error of each sample, [B], in fp32 whatever the precision of the prediction."""
    return (prediction.float() - wanted.float()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Objective:
    """The objective of one run, with its tables (one value per timestep) on the device, so that no step waits."""

    alphas: Tensor
    weights: Tensor
    prediction: Prediction

    @classmethod
    def of(
        cls, alphas_cumprod: Tensor, *, prediction: Prediction, gamma: float | None, device: torch.device
    ) -> Objective:
        """Return the objective of a model's noise schedule `alphas_cumprod` [T]; the tables are computed in fp64."""
        alphas = alphas_cumprod.double().cpu()
        weights = snr_weights(alphas, gamma=gamma, prediction=prediction)
        return cls(alphas.float().to(device), weights.float().to(device), prediction)

    def noisy(self, latents: Tensor, noise: Tensor, *, timesteps: Tensor) -> Tensor:
        """Return the denoiser's input [B,C,H,W]."""
        return add_noise(latents, noise, alphas=self.alphas[timesteps])

    def errors(self, prediction: Tensor, latents: Tensor, noise: Tensor, *, timesteps: Tensor) -> Tensor:
        """Return the mean squared error of each sample, [B], without its weight."""
        wanted = target(latents, noise, alphas=self.alphas[timesteps], prediction=self.prediction)
        return sample_losses(prediction, wanted)
