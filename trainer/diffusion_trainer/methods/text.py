"""Text encoders as what is trained: which of them, and the names of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from diffusion_trainer.models import Family

_CLIP = "text_model."
_FIXED = {("SD3", "text_encoder", "text_projection.weight")}
"""Single files lack it, and their readers do without: what it learned would be lost on the way to them."""


def clip_encoders(family: Family) -> dict[str, nn.Module]:
    """Return CLIP's text encoders of a family by their folders; T5 is never trained."""
    return {name: encoder for name, encoder in family.text_encoders.items() if is_clip(encoder)}


def in_steps(family: Family) -> list[nn.Module]:
    """Return CLIP's text encoders as a part of the steps, on the denoiser's device, dropping nothing of their own.

    In training mode, which recomputing their activations needs, attention would drop what its configuration says.
    """
    encoders = list(clip_encoders(family).values())
    for encoder in encoders:
        encoder.to(family.device)
        for module in encoder.modules():
            layer: Any = module
            if isinstance(getattr(layer, "dropout", None), float):
                layer.dropout = 0.0
    return encoders


def is_clip(encoder: nn.Module) -> bool:
    """Return whether a text encoder is CLIP's, with or without its projection."""
    return type(encoder).__name__ in {"CLIPTextModel", "CLIPTextModelWithProjection"}


def published_name(path: str) -> str:
    """Return the name of a weight of CLIP's text encoder as it stands in published files.

    transformers 5.6 dropped the prefix `text_model.` from CLIPTextModel, and no program that loads adapters did.
    """
    return path if path.startswith((_CLIP, "text_projection.")) else _CLIP + path


def trainable(family: Family) -> Iterator[tuple[str, nn.Parameter]]:
    """Make the weights of CLIP's text encoders trainable and yield them as `text_encoder.<published name>`."""
    for folder, encoder in clip_encoders(family).items():
        for path, parameter in encoder.named_parameters():
            if (family.name, folder, path) not in _FIXED:
                parameter.requires_grad = True
                yield f"{folder}.{published_name(path)}", parameter
