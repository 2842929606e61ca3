"""Stable Diffusion 1.x: UNet with cross-attention, CLIP-L's last hidden state, four-channel VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.models.base import Conditioning, Targets
from diffusion_trainer.models.files import ModelFiles
from diffusion_trainer.models.inspection import TRAINABLE, check_files, check_networks
from diffusion_trainer.models.latent import CLIP_TOKENS, TextToImage, token_ids, unet_targets
from diffusion_trainer.models.loading import load_discrete_process, load_text_encoder, load_tokenizer, loaded
from diffusion_trainer.objective import Process


class StableDiffusion1(TextToImage):
    """The family SD1; see `models.base.Family`. Conditioning: `text` [77, D]."""

    name: FamilyName = "SD1"
    conditioning_names = ("text",)
    token_names = ("tokens",)

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
        from transformers import CLIPTextModel, CLIPTokenizer

        super().__init__(files, device=device, dtype=dtype)
        folder = files.folder
        self.denoiser: nn.Module = loaded(UNet2DConditionModel, folder / "unet", torch_dtype=weights_dtype).to(device)
        self._encoder = load_text_encoder(CLIPTextModel, folder / "text_encoder")
        self.text_encoders["text_encoder"] = self._encoder
        self.tokenizers["tokenizer"] = load_tokenizer(CLIPTokenizer, folder / "tokenizer", self._encoder)
        self.process: Process = load_discrete_process(folder)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102 - as in `Family`; likewise below
        return {"tokens": token_ids(self.tokenizers["tokenizer"], captions, length=CLIP_TOKENS)}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        # Without an attention mask, as the model was trained: it attends to the padding.
        return {"text": self._encoder(tokens["tokens"].to(self._encoder.device)).last_hidden_state}

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:  # noqa: ARG002, D102
        predicted: Tensor = self.denoiser(noisy, times, conditioning["text"]).sample
        return predicted

    def lora_target_modules(self, targets: Targets) -> list[str]:  # noqa: D102
        return unet_targets(targets)
