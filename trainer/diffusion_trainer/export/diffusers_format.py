"""Adapters as diffusers and PEFT load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_trainer import tensorfile
from diffusion_trainer.export.adapter_names import modules
from diffusion_trainer.export.components import by_component, denoiser_folder
from diffusion_trainer.methods.lora import MAGNITUDE, clip_targets
from diffusion_trainer.models.base import Family

FILE = "pytorch_lora_weights.safetensors"


def export_diffusers(weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec, *, folder: Path) -> list[Path]:
    """Write `pytorch_lora_weights.safetensors` into `folder` and return the files written.

    `weights` are the adapters by the names of `methods`, on any device; they are stored as they are (fp32). The header
    carries PEFT's configuration (`lora_adapter_metadata`), because the format has no tensor for alpha and readers
    without it assume alpha = rank.
    """
    lora = spec.lora or LoRA()
    tensors: dict[str, Tensor] = {}
    adapter: dict[str, object] = {}
    for component, adapters in by_component(weights, family).items():
        modules(adapters)
        tensors |= {f"{component}.{_as_read(name)}": tensor for name, tensor in adapters.items()}
        is_denoiser = component == denoiser_folder(family)
        adapter |= {
            f"{component}.peft_type": "LORA",
            f"{component}.r": lora.rank,
            f"{component}.lora_alpha": lora.alpha,
            f"{component}.lora_dropout": lora.dropout,
            f"{component}.target_modules": (
                family.lora_target_modules(lora.targets) if is_denoiser else clip_targets(lora)
            ),
            f"{component}.bias": "none",
            f"{component}.use_dora": lora.use_dora,
            f"{component}.use_rslora": False,
        }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    tensorfile.write(path, tensors, metadata)
    return [path]


def _as_read(name: str) -> str:
    """Return the name that both PEFT and transformers, which loads text encoders' adapters, take for a magnitude."""
    return f"{name}.weight" if name.endswith(MAGNITUDE) else name
