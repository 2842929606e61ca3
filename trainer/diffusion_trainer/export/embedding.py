"""New words: the vectors of a token as diffusers, and as AUTOMATIC1111 and ComfyUI load them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_trainer import tensorfile
from diffusion_trainer.models.base import Family

_PLACES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_VECTORS = ".vectors"


def export_learned_embeds(
    weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec, *, folder: Path
) -> list[Path]:
    """Write `learned_embeds.safetensors`, and one file more for each further text encoder; return the files written.

    Each holds one tensor [vectors, width] with the token's name (diffusers' `load_textual_inversion`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for encoder, vectors in _of_encoders(weights, family).items():
        path = folder / f"learned_embeds{encoder.removeprefix('text_encoder')}.safetensors"
        tensorfile.write(path, {_token(spec): vectors}, {"format": "pt"})
        paths.append(path)
    return paths


def export_emb_params(weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec, *, folder: Path) -> list[Path]:
    """Write the file that AUTOMATIC1111, Forge and ComfyUI know by its name, which is the token's; return it.

    It holds `emb_params`, or `clip_l` and `clip_g` for SDXL.
    """
    found = _of_encoders(weights, family)
    tensors = {_PLACES[encoder] if len(found) > 1 else "emb_params": vectors for encoder, vectors in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '', _token(spec)) or 'token'}.safetensors"
    tensorfile.write(path, tensors, {"format": "pt"})
    return [path]


def _of_encoders(weights: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Return the vectors of each text encoder by its folder."""
    return {
        encoder: weights[encoder + _VECTORS].detach()
        for encoder in family.text_encoders
        if encoder + _VECTORS in weights
    }


def _token(spec: TrainerSpec) -> str:
    if spec.textual_inversion is None:
        raise ValueError("export: an embedding without textualInversion")
    return spec.textual_inversion.token
