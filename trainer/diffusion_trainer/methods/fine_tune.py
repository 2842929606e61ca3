"""Weights of the model itself: all of the denoiser, or those of its attention."""

from __future__ import annotations

import re

import torch
from torch import nn

from diffusion_api.job import TrainerSpec
from diffusion_trainer.methods.base import Attached, named_group
from diffusion_trainer.methods.conditioning import TextPath
from diffusion_trainer.methods.dropout import Masks, key_dropout
from diffusion_trainer.methods.text import in_steps, trainable
from diffusion_trainer.models import Family

_PARTS = {
    "All": re.compile(""),
    "Attention": re.compile(r"\.attn\d?\."),
    "CrossAttention": re.compile(r"\.attn2\."),
}
"""Which weights of a denoiser belong to a part, by their names in diffusers' networks."""


def attach_weights(family: Family, spec: TrainerSpec) -> Attached:
    """Make weights of the denoiser trainable, and those of CLIP where the job trains it.

    The denoiser was opened with fp32 weights; what stays frozen is put into the dtype of the forward pass.
    """
    masks = Masks()
    key_dropout(family.denoiser, masks)
    part = _PARTS[spec.fine_tune.parts if spec.fine_tune else "All"]
    chosen = {path: weight for path, weight in family.denoiser.named_parameters() if part.search(path)}
    _freeze_others(family.denoiser, set(chosen), family.dtype)
    groups = [named_group(chosen.items())]
    encoders: list[nn.Module] = []
    trains_text = spec.model.text_encoder.train
    if trains_text:
        encoders = in_steps(family)
        scale = spec.model.text_encoder.learning_rate / spec.learning_rate
        groups.append(named_group(trainable(family), lr_scale=scale))
    text = TextPath(family, live=trains_text)
    return Attached("Weights", tuple(groups), (family.denoiser, *encoders), text, masks=masks)


def _freeze_others(denoiser: nn.Module, chosen: set[str], dtype: torch.dtype) -> None:
    for path, weight in denoiser.named_parameters():
        weight.requires_grad_(path in chosen)
        weight.data = weight.data.to(torch.float32 if path in chosen else dtype)
