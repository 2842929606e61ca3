"""Stable Diffusion XL: UNet with two text encoders, the pooled text, and the geometry of the crop (arXiv 2307.01952).

Its published VAE overflows in fp16; here every VAE computes in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.models.base import Conditioning, Targets
from diffusion_trainer.models.files import ModelFiles
from diffusion_trainer.models.inspection import TRAINABLE, check_files, check_networks
from diffusion_trainer.models.latent import CLIP_TOKENS, TextToImage, token_ids, unet_targets
from diffusion_trainer.models.loading import load_discrete_process, load_text_encoder, load_tokenizer, loaded
from diffusion_trainer.objective import Process


class StableDiffusionXL(TextToImage):
    """The family SDXL; see `models.base.Family`. Conditioning: `text` [77, D1 + D2], `pooled` [D2]."""

    name: FamilyName = "SDXL"
    conditioning_names = ("text", "pooled")
    token_names = ("tokens", "tokens_2")

    @classmethod
    def open(cls, folder: Path, *, device: torch.device, dtype: torch.dtype, weights_dtype: torch.dtype) -> Self:
        """Check and load a model of this family. Raises `InputMissing` and `BadData`."""
        weights = check_files(folder, TRAINABLE[cls.name])
        check_networks(folder, cls.name)
        return cls(ModelFiles(folder, weights), device=device, dtype=dtype, weights_dtype=weights_dtype)

    def __init__(
        self, files: ModelFiles, *, device: torch.device, dtype: torch.dtype, weights_dtype: torch.dtype
    ) -> None:
        """Load from a folder that has been checked."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        super().__init__(files, device=device, dtype=dtype)
        folder = files.folder
        self.denoiser: nn.Module = loaded(UNet2DConditionModel, folder / "unet", torch_dtype=weights_dtype).to(device)
        self._encoder = load_text_encoder(CLIPTextModel, folder / "text_encoder")
        self._encoder_2 = load_text_encoder(CLIPTextModelWithProjection, folder / "text_encoder_2")
        self.text_encoders |= {"text_encoder": self._encoder, "text_encoder_2": self._encoder_2}
        for name, encoder in (("tokenizer", self._encoder), ("tokenizer_2", self._encoder_2)):
            self.tokenizers[name] = load_tokenizer(CLIPTokenizer, folder / name, encoder)
        self.process: Process = load_discrete_process(folder)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102 - as in `Family`; likewise below
        return {
            tokens: token_ids(tokenizer, captions, length=CLIP_TOKENS)
            for tokens, tokenizer in zip(self.token_names, self.tokenizers.values(), strict=True)
        }

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        first = self._encoder(tokens["tokens"].to(self._encoder.device), output_hidden_states=True)
        second = self._encoder_2(tokens["tokens_2"].to(self._encoder_2.device), output_hidden_states=True)
        return {"text": penultimate(first, second), "pooled": second.text_embeds}

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:  # noqa: D102
        added = {"text_embeds": conditioning["pooled"], "time_ids": geometry}
        predicted: Tensor = self.denoiser(noisy, times, conditioning["text"], added_cond_kwargs=added).sample
        return predicted

    def lora_target_modules(self, targets: Targets) -> list[str]:  # noqa: D102
        return unet_targets(targets)


def penultimate(*outputs: Any) -> Tensor:
    """Return the last hidden states but one of several text encoders, side by side: before the final norm."""
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
