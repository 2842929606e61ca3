"""Stable Diffusion 1.x: UNet with cross-attention, CLIP-L's last hidden state, four-channel VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.errors import BadData
from diffusion_trainer.models.autoencoder import Autoencoder
from diffusion_trainer.models.base import Conditioning, Targets
from diffusion_trainer.models.files import ModelFiles
from diffusion_trainer.models.inspection import SD1, check_files, read_json
from diffusion_trainer.models.loading import load_discrete_process, load_text_encoder, load_tokenizer, loaded, release
from diffusion_trainer.objective import Process

TOKENS = 77
_LATENT_CHANNELS = 4
_ATTENTION = ["to_k", "to_out.0", "to_q", "to_v"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]


def open_sd1(folder: Path, *, device: torch.device, dtype: torch.dtype) -> StableDiffusion1:
    """Check and load a model of this family. Raises `InputMissing` and `BadData`."""
    weights = check_files(folder, SD1)
    config = read_json(folder / "unet" / "config.json")
    if config.get("in_channels", _LATENT_CHANNELS) != _LATENT_CHANNELS:
        raise BadData(
            f"model: unet/config.json has in_channels {config['in_channels']}, as inpainting models have; a "
            f"text-to-image model has {_LATENT_CHANNELS}: use that"
        )
    return StableDiffusion1(ModelFiles(folder, weights), device=device, dtype=dtype)


class StableDiffusion1:
    """The family SD1; see `models.base.Family`. Conditioning: `text` [77, D]."""

    name: FamilyName = "SD1"
    latent_scale = 8
    latent_channels = _LATENT_CHANNELS
    conditioning_names = ("text",)
    token_names = ("tokens",)

    def __init__(self, files: ModelFiles, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load from a folder that `check_files` has passed."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.device = device
        self.dtype = dtype
        self._files = files
        folder = files.folder
        self.denoiser: nn.Module = loaded(UNet2DConditionModel, folder / "unet", torch_dtype=dtype).to(device)
        self._autoencoder = Autoencoder(folder, device=device)
        self._encoder = load_text_encoder(CLIPTextModel, folder / "text_encoder")
        self._tokenizer = load_tokenizer(CLIPTokenizer, folder / "tokenizer", self._encoder)
        self.process: Process = load_discrete_process(folder)

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:  # noqa: D102 - as in `Family`; likewise below
        return {"text_encoder": self._encoder}

    @property
    def tokenizers(self) -> Mapping[str, Any]:  # noqa: D102
        return {"tokenizer": self._tokenizer}

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self._autoencoder.encode(pixels)

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102
        self._encoder.to(self.device)
        with torch.no_grad():
            encoded = self.encode_tokens(self.tokenize(captions))
        return {name: tensor.float().cpu() for name, tensor in encoded.items()}

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102
        tokens = self._tokenizer(
            list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        )
        return {"tokens": tokens.input_ids}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        # Without an attention mask, as the model was trained: it attends to the padding.
        return {"text": self._encoder(tokens["tokens"].to(self._encoder.device)).last_hidden_state}

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:  # noqa: ARG002, D102
        predicted: Tensor = self.denoiser(noisy, times, conditioning["text"]).sample
        return predicted

    def decode(self, latents: Tensor) -> Tensor:  # noqa: D102
        return self._autoencoder.decode(latents)

    def lora_target_modules(self, targets: Targets) -> list[str]:  # noqa: D102
        return _ATTENTION if targets == "Attention" else sorted(_ATTENTION + _FEED_FORWARD)

    def vae_hash(self) -> str:  # noqa: D102
        return self._files.digest(["vae"])

    def text_hash(self) -> str:  # noqa: D102
        return self._files.digest(["text_encoder"], ["tokenizer"])

    def weight_files(self) -> dict[str, Path]:  # noqa: D102
        return dict(self._files.weights)

    def file_hashes(self) -> dict[str, str]:  # noqa: D102
        return self._files.hashes()

    def release_encoders(self) -> None:  # noqa: D102
        self._autoencoder.release()
        release(self._encoder)
