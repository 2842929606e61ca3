"""Unconditional models: a UNet that works on pixels, as DDPM does (arXiv 2006.11239). No text, no VAE."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.models.autoencoder import as_bytes
from diffusion_trainer.models.base import Conditioning, Targets
from diffusion_trainer.models.files import ModelFiles
from diffusion_trainer.models.loading import load_discrete_process, loaded
from diffusion_trainer.objective import Process

_PIXELS = hashlib.sha256(b"the pixels themselves, in [-1, 1]").hexdigest()
_NOTHING = hashlib.sha256(b"no text").hexdigest()


class UnconditionalUNet:
    """The family UNet2D; see `models.base.Family`. Its latents are the pixels, its conditioning is empty."""

    name: FamilyName = "UNet2D"
    latent_scale = 1
    latent_channels = 3
    conditioning_names: tuple[str, ...] = ()
    token_names: tuple[str, ...] = ()

    def __init__(
        self, files: ModelFiles, *, device: torch.device, dtype: torch.dtype, weights_dtype: torch.dtype
    ) -> None:
        """Load from a folder that has been checked."""
        from diffusers import UNet2DModel

        self.device = device
        self.dtype = dtype
        self.text_encoders: dict[str, nn.Module] = {}
        self.tokenizers: dict[str, Any] = {}
        self._files = files
        denoiser: Any = loaded(UNet2DModel, files.folder / "unet", torch_dtype=weights_dtype).to(device)
        self.denoiser: nn.Module = denoiser
        self.size_multiple = 2 ** (len(denoiser.config.block_out_channels) - 1)
        self.process: Process = load_discrete_process(files.folder)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102 - as in `Family`; likewise below
        return pixels.float().cpu(), torch.zeros_like(pixels, dtype=torch.float32, device="cpu")

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: ARG002, D102
        return {}

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: ARG002, D102
        return {}

    def cut_off(self, captions: Sequence[str]) -> list[str]:  # noqa: ARG002, D102
        return []

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002, D102
        return {}

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:  # noqa: ARG002, D102
        predicted: Tensor = self.denoiser(noisy, times).sample
        return predicted

    def decode(self, latents: Tensor) -> Tensor:  # noqa: D102
        return as_bytes(latents)

    def lora_target_modules(self, targets: Targets) -> list[str]:  # noqa: ARG002, D102
        return []

    def vae_hash(self) -> str:  # noqa: D102
        return _PIXELS

    def text_hash(self) -> str:  # noqa: D102
        return _NOTHING

    def weight_files(self) -> dict[str, Path]:  # noqa: D102
        return dict(self._files.weights)

    def file_hashes(self) -> dict[str, str]:  # noqa: D102
        return self._files.hashes()

    def release_encoders(self) -> None:
        """There are none."""
