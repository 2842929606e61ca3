"""What families with a VAE and text encoders have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_trainer.models.autoencoder import Autoencoder
from diffusion_trainer.models.files import ModelFiles
from diffusion_trainer.models.loading import release

CLIP_TOKENS = 77
_ATTENTION = ["to_k", "to_out.0", "to_q", "to_v"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]


class TextToImage(ABC):
    """The encoders of a text-to-image model, in fp32 and on the CPU until they are used; see `models.base.Family`.

    A family says what becomes of captions (`tokenize`, `encode_tokens`) and how its denoiser is called (`predict`).
    """

    latent_scale = 8
    size_multiple = 8

    def __init__(self, files: ModelFiles, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load the VAE. The subclass loads text encoders, tokenizers and the denoiser."""
        self.device = device
        self.dtype = dtype
        self.text_encoders: dict[str, nn.Module] = {}
        self.tokenizers: dict[str, Any] = {}
        self._files = files
        self._autoencoder = Autoencoder(files.folder, device=device)

    @property
    def latent_channels(self) -> int:  # noqa: D102 - as in `Family`; likewise below
        return self._autoencoder.channels

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids by tokenizer, as in `Family`."""

    @abstractmethod
    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditioning of token ids, as in `Family`."""

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102
        for encoder in self.text_encoders.values():
            encoder.to(self.device)
        with torch.no_grad():
            encoded = self.encode_tokens(self.tokenize(captions))
        return {name: tensor.float().cpu() for name, tensor in encoded.items()}

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self._autoencoder.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:  # noqa: D102
        return self._autoencoder.decode(latents)

    def vae_hash(self) -> str:  # noqa: D102
        return self._files.digest(["vae"])

    def text_hash(self) -> str:  # noqa: D102
        return self._files.digest(list(self.text_encoders), list(self.tokenizers))

    def weight_files(self) -> dict[str, Path]:  # noqa: D102
        return dict(self._files.weights)

    def file_hashes(self) -> dict[str, str]:  # noqa: D102
        return self._files.hashes()

    def release_encoders(self) -> None:  # noqa: D102
        self._autoencoder.release()
        for encoder in self.text_encoders.values():
            release(encoder)


def unet_targets(targets: str) -> list[str]:
    """Return the linear layers of a UNet's transformer blocks that get adapters."""
    return _ATTENTION if targets == "Attention" else sorted(_ATTENTION + _FEED_FORWARD)


def token_ids(tokenizer: Any, captions: Sequence[str], *, length: int) -> Tensor:
    """Return tokens [B, length], cut or padded to that length."""
    found: Tensor = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return found
