"""Adapters as diffusers and PEFT load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_trainer import tensorfile
from diffusion_trainer.export.adapter_names import modules
from diffusion_trainer.models.base import Family

FILE = "pytorch_lora_weights.safetensors"


def export_diffusers(
    weights: Mapping[str, torch.Tensor], family: Family, spec: TrainerSpec, *, folder: Path
) -> list[Path]:
    """Write `pytorch_lora_weights.safetensors` into `folder` and return the files written.

    `weights` are the adapters by the names of `models.add_lora`, on any device; they are stored as they are (fp32). The
    header carries PEFT's configuration (`lora_adapter_metadata`), because the format has no tensor for alpha and
    readers without it assume alpha = rank.
    """
    modules(weights)
    lora = spec.lora or LoRA()
    adapter = {
        "unet.peft_type": "LORA",
        "unet.r": lora.rank,
        "unet.lora_alpha": lora.alpha,
        "unet.lora_dropout": lora.dropout,
        "unet.target_modules": family.lora_target_modules(lora.targets),
        "unet.bias": "none",
        "unet.use_dora": lora.use_dora,
        "unet.use_rslora": False,
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True)}
    tensors = {f"unet.{name}": tensor.detach() for name, tensor in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_bytes(tensorfile.encode(tensors, metadata))
    return [path]
