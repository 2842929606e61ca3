"""Stable Diffusion 3 and 3.5: a multimodal transformer, three text encoders, rectified flow (arXiv 2403.03206).

Text is that of both CLIP encoders, padded with zeros to T5's width, and T5's behind it. T5 attends to its padding and
keeps it, as in the published pipelines. T5 never learns: where CLIP is part of a step, what T5 says stands beside the
tokens for CLIP, so that it runs once for each caption and not in a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.models.base import Conditioning, Targets
from diffusion_trainer.models.latent import CLIP_TOKENS, TextToImage, token_ids
from diffusion_trainer.models.loading import load_flow_process
from diffusion_trainer.models.sdxl import clip_outputs, penultimate
from diffusion_trainer.objective import Process

T5_TOKENS = 256
_TIMESTEPS = 1000
_ATTENTION = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


class StableDiffusion3(TextToImage):
    """The family SD3; see `models.base.Family`. Conditioning: `text` [77 + 256, D], `pooled` [D1 + D2]."""

    name: FamilyName = "SD3"
    conditioning_names = ("text", "pooled")
    token_names = ("tokens", "tokens_2", "text_3")
    denoiser_folder = "transformer"
    reads_most = ("tokenizer_3", T5_TOKENS)

    @property
    def size_multiple(self) -> int:  # noqa: D102 - as in `Family`; likewise below
        return int(self.latent_scale * self.denoiser.config.patch_size)

    def load_process(self, folder: Path) -> Process:  # noqa: D102
        return load_flow_process(folder)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:  # noqa: D102
        first, second, third = self.tokenizers.values()
        t5 = self.text_encoders["text_encoder_3"].to(self.device)
        with torch.no_grad():
            said = t5(token_ids(third, captions, length=T5_TOKENS).to(self.device)).last_hidden_state
        return {
            "tokens": token_ids(first, captions, length=CLIP_TOKENS),
            "tokens_2": token_ids(second, captions, length=CLIP_TOKENS),
            "text_3": said.float().cpu(),
        }

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        first, second = clip_outputs(self.text_encoders, tokens)
        clip = penultimate(first, second)
        t5 = tokens["text_3"].to(clip.device)
        padded = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "text": torch.cat([padded, t5], dim=1),
            "pooled": torch.cat([first.text_embeds, second.text_embeds], dim=-1),
        }

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:  # noqa: ARG002, D102
        predicted: Tensor = self.denoiser(
            noisy,
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
            timestep=times * _TIMESTEPS,
        ).sample
        return predicted

    def text_hash(self) -> str:  # noqa: D102
        return hashlib.sha256(f"{super().text_hash()} {self.dtype}".encode()).hexdigest()  # T5's numbers depend on it

    def lora_target_modules(self, targets: Targets) -> list[str]:  # noqa: D102
        return _ATTENTION if targets == "Attention" else sorted(_ATTENTION + _FEED_FORWARD)
