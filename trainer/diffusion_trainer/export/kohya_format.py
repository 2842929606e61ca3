"""Adapters as kohya's sd-scripts, AUTOMATIC1111, Forge and ComfyUI load them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusion_api.job import TrainerSpec

from diffusion_trainer.models.base import Family


def export_kohya(
    weights: Mapping[str, torch.Tensor], family: Family, spec: TrainerSpec, *, folder: Path
) -> list[Path]:
    """Write `lora.safetensors` into `folder` and return the files written.

    `weights` as for `export_diffusers`. Three tensors for each module: lora_down, lora_up and alpha.
    """
    raise NotImplementedError
