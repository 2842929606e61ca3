"""Adapters as diffusers and PEFT load them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusion_api.job import TrainerSpec

from diffusion_trainer.models.base import Family


def export_diffusers(
    weights: Mapping[str, torch.Tensor], family: Family, spec: TrainerSpec, *, folder: Path
) -> list[Path]:
    """Write `pytorch_lora_weights.safetensors` into `folder` and return the files written.

    `weights` are the adapters by the names of `models.add_lora`, on any device. The header carries PEFT's configuration
    (`lora_adapter_metadata`), because the format has no tensor for alpha and readers without it assume alpha = rank.
    """
    raise NotImplementedError
