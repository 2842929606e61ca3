"""Stable Diffusion 1.x: UNet with cross-attention, CLIP-L's last hidden state, four-channel VAE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from diffusion_trainer.errors import BadData
from diffusion_trainer.models.base import NoiseSchedule, Targets
from diffusion_trainer.models.inspection import SD1, check_files, read_json

TOKENS = 77
TIMESTEPS = 1000
_LATENT_CHANNELS = 4
_ATTENTION = ["to_k", "to_out.0", "to_q", "to_v"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
_PREDICTIONS: dict[str, Literal["Epsilon", "VPrediction", "Sample"]] = {
    "epsilon": "Epsilon",
    "v_prediction": "VPrediction",
    "sample": "Sample",
}
# What of a noise scheduler's configuration decides the forward process; the rest is about sampling.
_FORWARD_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def open_sd1(folder: Path, *, device: torch.device, dtype: torch.dtype) -> StableDiffusion1:
    """Check and load a model of this family. Raises `InputMissing` and `BadData`."""
    weights = check_files(folder, SD1)
    config = read_json(folder / "unet" / "config.json")
    if config.get("in_channels", _LATENT_CHANNELS) != _LATENT_CHANNELS:
        raise BadData(
            f"model: unet/config.json has in_channels {config['in_channels']}, as inpainting models have; a "
            f"text-to-image model has {_LATENT_CHANNELS}: use that"
        )
    return StableDiffusion1(folder, weights, device=device, dtype=dtype)


class StableDiffusion1:
    """The family SD1; see `models.base.Family`."""

    name: Literal["SD1"] = "SD1"
    latent_scale = 8

    def __init__(self, folder: Path, weights: dict[str, Path], *, device: torch.device, dtype: torch.dtype) -> None:
        """Load from a folder that `check_files` has passed."""
        from diffusers import AutoencoderKL, UNet2DConditionModel

        self.device = device
        self.dtype = dtype
        self._folder = folder
        self._weights = weights
        self._hashes: dict[str, str] = {}
        self.denoiser: nn.Module = _loaded(UNet2DConditionModel, folder / "unet", torch_dtype=dtype).to(device)
        self._vae = _frozen(_loaded(AutoencoderKL, folder / "vae", torch_dtype=torch.float32))
        self._text_encoder, self._tokenizer = _text_encoder(folder)
        self._schedule = _schedule(folder)

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: D102 - as in `Family`; likewise below
        vae = self._vae.to(self.device)
        with torch.no_grad():
            posterior = vae.encode(pixels.to(self.device, torch.float32)).latent_dist
            factor = vae.config.scaling_factor
            return (posterior.mean * factor).cpu(), (posterior.std * factor).cpu()

    def encode_text(self, captions: Sequence[str]) -> torch.Tensor:  # noqa: D102
        tokens = self._tokenizer(
            list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        encoder = self._text_encoder.to(self.device)
        with torch.no_grad():
            # Without an attention mask, as the model was trained: it attends to the padding.
            hidden: torch.Tensor = encoder(tokens.to(self.device)).last_hidden_state
        return hidden.float().cpu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:  # noqa: D102
        vae = self._vae.to(self.device)
        with torch.no_grad():
            images = vae.decode(latents.to(self.device, torch.float32) / vae.config.scaling_factor).sample
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def noise_schedule(self) -> NoiseSchedule:  # noqa: D102
        return self._schedule

    def lora_target_modules(self, targets: Targets) -> list[str]:  # noqa: D102
        return _ATTENTION if targets == "Attention" else sorted(_ATTENTION + _FEED_FORWARD)

    def vae_hash(self) -> str:  # noqa: D102
        return self._digest("vae", ["vae/config.json"])

    def text_hash(self) -> str:  # noqa: D102
        tokenizer = sorted((self._folder / "tokenizer").glob("*"))
        return self._digest("text_encoder", ["text_encoder/config.json", *(f"tokenizer/{p.name}" for p in tokenizer)])

    def weight_files(self) -> dict[str, Path]:  # noqa: D102
        return dict(self._weights)

    def file_hashes(self) -> dict[str, str]:  # noqa: D102
        return {relative: self._file_hash(relative) for relative in sorted(self._weights)}

    def release_encoders(self) -> None:  # noqa: D102
        self._vae.to("cpu")
        self._text_encoder.to("cpu")

    def _digest(self, component: str, others: list[str]) -> str:
        weights = [relative for relative in self._weights if relative.startswith(f"{component}/")]
        content = {relative: self._file_hash(relative) for relative in [*weights, *others]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _file_hash(self, relative: str) -> str:
        if relative not in self._hashes:
            with (self._folder / relative).open("rb") as file:
                self._hashes[relative] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[relative]


def _loaded(kind: Any, folder: Path, **how: Any) -> Any:
    """Load one component, and refuse it when the library had to make up weights of its own (it only logs that)."""
    try:
        loaded, report = kind.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise BadData(f"model: {folder.name} cannot be loaded ({error}); replace it by the original files") from error
    wrong = sorted(report["missing_keys"]) + sorted(str(entry) for entry in report.get("mismatched_keys", ()))
    if wrong:
        raise BadData(
            f"model: {len(wrong)} weights of {folder.name} are missing or of another shape than config.json says, "
            f"e.g. {wrong[0]}; replace the folder by the original files"
        )
    return loaded


def _text_encoder(folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a pod's log is no terminal

    encoder = _loaded(CLIPTextModel, folder / "text_encoder", dtype=torch.float32, trust_remote_code=False)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            str(folder / "tokenizer"), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise BadData(f"model: tokenizer cannot be loaded ({error}); replace it by the original files") from error
    if len(tokenizer) > encoder.config.vocab_size:
        raise BadData(
            f"model: the tokenizer has {len(tokenizer)} words and the text encoder {encoder.config.vocab_size}; they "
            "belong to different models: use the tokenizer that came with the text encoder"
        )
    return _frozen(encoder), tokenizer


def _frozen(module: Any) -> Any:
    return module.requires_grad_(False).eval()


def _schedule(folder: Path) -> NoiseSchedule:
    from diffusers import DDPMScheduler

    config = read_json(folder / "scheduler" / "scheduler_config.json")
    prediction = config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", TIMESTEPS)
    if prediction not in _PREDICTIONS or steps != TIMESTEPS:
        raise BadData(
            f"model: scheduler/scheduler_config.json has prediction_type {prediction!r} and num_train_timesteps "
            f"{steps}; allowed are {', '.join(_PREDICTIONS)} and {TIMESTEPS}"
        )
    try:
        scheduler = DDPMScheduler(**{key: config[key] for key in _FORWARD_PROCESS if config.get(key) is not None})
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BadData(f"model: scheduler/scheduler_config.json cannot be used ({error}); replace it") from error
    return NoiseSchedule(scheduler.alphas_cumprod, _PREDICTIONS[prediction], config)
