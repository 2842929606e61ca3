"""Stable Diffusion XL: UNet with two text encoders, the pooled text, and the geometry of the crop (arXiv 2307.01952).

Its published VAE overflows in fp16; here every VAE computes in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.models.base import Conditioning, Targets
from diffusion_trainer.models.latent import CLIP_TOKENS, TextToImage, token_ids, unet_targets


class StableDiffusionXL(TextToImage):
    """The family SDXL; see `models.base.Family`. Conditioning: `text` [77, D1 + D2], `pooled` [D2]."""

    name: FamilyName = "SDXL"
    conditioning_names = ("text", "pooled")
    token_names = ("tokens", "tokens_2")

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102 - as in `Family`; likewise below
        return {
            tokens: token_ids(tokenizer, captions, length=CLIP_TOKENS)
            for tokens, tokenizer in zip(self.token_names, self.tokenizers.values(), strict=True)
        }

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        first, second = clip_outputs(self.text_encoders, tokens)
        return {"text": penultimate(first, second), "pooled": second.text_embeds}

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:  # noqa: D102
        added = {"text_embeds": conditioning["pooled"], "time_ids": geometry}
        predicted: Tensor = self.denoiser(noisy, times, conditioning["text"], added_cond_kwargs=added).sample
        return predicted

    def lora_target_modules(self, targets: Targets) -> list[str]:  # noqa: D102
        return unet_targets(targets)


def clip_outputs(encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield what the two CLIP text encoders of SDXL and SD3 make of their tokens, with their hidden states."""
    for encoder, name in (("text_encoder", "tokens"), ("text_encoder_2", "tokens_2")):
        yield encoders[encoder](tokens[name].to(encoders[encoder].device), output_hidden_states=True)


def penultimate(*outputs: Any) -> Tensor:
    """Return the last hidden states but one of several text encoders, side by side: before the final norm."""
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
