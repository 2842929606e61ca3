"""Images to latents and back, by diffusers' AutoencoderKL."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffusion_trainer.models.loading import frozen, loaded


class Autoencoder:
    """The VAE of a model, always in fp32. It is on the CPU until it is used, and after `release`."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        """Load from the model's folder."""
        from diffusers import AutoencoderKL

        self._device = device
        self._vae = frozen(loaded(AutoencoderKL, folder / "vae", torch_dtype=torch.float32))
        config = self._vae.config
        self.channels: int = config.latent_channels
        self._factor: float = config.scaling_factor
        self._shift: float = config.shift_factor or 0.0

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean - shift) * factor and std * factor of the posterior; see `Family.encode_images`."""
        vae = self._vae.to(self._device)
        with torch.no_grad():
            posterior = vae.encode(pixels.to(self._device, torch.float32)).latent_dist
            mean = (posterior.mean - self._shift) * self._factor
            return mean.cpu(), (posterior.std * self._factor).cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """Return images as uint8 [B, H, W, 3], on the CPU."""
        vae = self._vae.to(self._device)
        with torch.no_grad():
            images = vae.decode(latents.to(self._device, torch.float32) / self._factor + self._shift).sample
        return as_bytes(images)

    def release(self) -> None:
        """Move to the CPU."""
        self._vae.to("cpu")


def as_bytes(images: Tensor) -> Tensor:
    """Return images [B, 3, H, W] in [-1, 1] as uint8 [B, H, W, 3], on the CPU."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
