"""What the rest of the trainer knows of a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.objective import Process

Targets = Literal["Attention", "AttentionAndFeedForward"]
Conditioning: TypeAlias = Mapping[str, Tensor]
"""What the denoiser is told besides image and time: tensors [B, ...] by names that are the family's own."""


class Family(Protocol):
    """One loaded model. Encoders run in fp32; the denoiser in the dtype it was opened with."""

    @property
    def name(self) -> FamilyName:
        """Return the family's name in the API."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """Return the network that is trained. It is called through `predict` only."""
        ...

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """Return the text encoders by their folders in the model; none for a family without text."""
        ...

    @property
    def tokenizers(self) -> Mapping[str, Any]:
        """Return the tokenizers (of transformers) by their folders in the model."""
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
        """Return how many pixels one latent is wide: 8, or 1 where the latents are the pixels."""
        ...

    @property
    def size_multiple(self) -> int:
        """Return what width and height of an image, in pixels, have to be multiples of."""
        ...

    @property
    def latent_channels(self) -> int:
        """Return the channels of the latents, C."""
        ...

    @property
    def process(self) -> Process:
        """Return the forward process that is trained: the model's own, predicting what the job asks for."""
        ...

    @property
    def published(self) -> Process:
        """Return the forward process of the weights as they were published, before any step of this job."""
        ...

    @property
    def conditioning_names(self) -> tuple[str, ...]:
        """Return the names of what `encode_text` and `encode_tokens` return."""
        ...

    @property
    def token_names(self) -> tuple[str, ...]:
        """Return the names of what `tokenize` returns: of tokens, and of what T5 says."""
        ...

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the posterior, shifted and scaled as the denoiser wants latents.

        pixels: [B, 3, H, W] in [-1, 1]; both results: fp32 [B, C, H/scale, W/scale], on the CPU.
        """
        ...

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of captions, fp32 [B, ...], on the CPU, without gradients. Long captions are cut."""
        ...

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return what of captions no training changes, on the CPU, without gradients.

        Tokens, int64 [B, length], and of text encoders that never learn (T5) what they say, fp32 [B, length, D].
        """
        ...

    def cut_off(self, captions: Sequence[str]) -> list[str]:
        """Return the captions that are longer than any text encoder reads: what is behind that, nobody learns."""
        ...

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditioning of what `tokenize` returned, where CLIP is; gradients pass through CLIP."""
        ...

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        """Return what the denoiser answers, [B, C, h, w]. The caller opens autocast.

        noisy: fp32 [B, C, h, w]; times: [B], of `process`; conditioning: as from `encode_text`; geometry: fp32 [B, 6],
        of the crop: original height and width, top and left, height and width. All on the denoiser's device.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of scaled latents [B, C, h, w] as uint8 [B, H, W, 3], on the CPU."""
        ...

    def lora_target_modules(self, targets: Targets) -> list[str]:
        """Return the suffixes of the names of the denoiser's linear layers that get an adapter."""
        ...

    def vae_hash(self) -> str:
        """Return the sha256 of everything that decides what `encode_images` returns."""
        ...

    def text_hash(self) -> str:
        """Return the sha256 of everything that decides what `encode_text` and `tokenize` return."""
        ...

    def weight_files(self) -> dict[str, Path]:
        """Return the weight files as they were published, by their path in the model's folder."""
        ...

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of each weight file, by its path in the model's folder."""
        ...

    def release_encoders(self) -> None:
        """Move VAE and text encoders to the CPU, out of the denoiser's way. They come back by themselves when used.

        Text encoders that are trained stay.
        """
        ...
