"""What the rest of the trainer knows of a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

Targets = Literal["Attention", "AttentionAndFeedForward"]


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The forward process of a family.

    alphas_cumprod: fp32 [T] on the CPU; prediction_type as in the API; config: of the model's own noise scheduler.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: Literal["Epsilon", "VPrediction", "Sample"]
    config: Mapping[str, Any]


class Family(Protocol):
    """One loaded model. Encoders run in fp32 and without gradients; the denoiser in the dtype it was opened with."""

    @property
    def name(self) -> Literal["SD1"]:
        """Return the family's name in the API."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """Return the network that is trained: `denoiser(latents, timesteps, text).sample` is [B, 4, h, w]."""
        ...

    @property
    def device(self) -> torch.device:
        """Return where the denoiser is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the frozen weights of the denoiser; autocast to it unless it is fp32."""
        ...

    @property
    def latent_scale(self) -> int:
        """Return how many pixels one latent is wide: 8."""
        ...

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the posterior, times the VAE's scaling factor.

        pixels: [B, 3, H, W] in [-1, 1]; both results: fp32 [B, 4, H/8, W/8], on the CPU.
        """
        ...

    def encode_text(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the conditioning of captions, fp32 [B, 77, D], on the CPU. Longer captions are cut at 77 tokens."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the images of scaled latents [B, 4, h, w] as uint8 [B, H, W, 3], on the CPU."""
        ...

    def noise_schedule(self) -> NoiseSchedule:
        """Return the forward process."""
        ...

    def lora_target_modules(self, targets: Targets) -> list[str]:
        """Return the suffixes of the names of the denoiser's linear layers that get an adapter."""
        ...

    def vae_hash(self) -> str:
        """Return the sha256 of everything that decides what `encode_images` returns."""
        ...

    def text_hash(self) -> str:
        """Return the sha256 of everything that decides what `encode_text` returns."""
        ...

    def weight_files(self) -> dict[str, Path]:
        """Return the weight files as they were published, by their path in the model's folder."""
        ...

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of each weight file, by its path in the model's folder."""
        ...

    def release_encoders(self) -> None:
        """Move VAE and text encoder to the CPU, out of the denoiser's way. They come back by themselves when used."""
        ...
