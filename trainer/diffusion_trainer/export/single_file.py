"""The whole model in one file, as AUTOMATIC1111 and ComfyUI load it, with the adapters merged in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_trainer import tensorfile
from diffusion_trainer.export import original_names
from diffusion_trainer.export.adapter_names import DOWN, UP, modules
from diffusion_trainer.models.base import Family

FILE = "model.safetensors"
_POSITIONS = original_names.TEXT + "embeddings.position_ids"


def export_single_file(
    weights: Mapping[str, torch.Tensor], family: Family, spec: TrainerSpec, *, folder: Path
) -> list[Path]:
    """Write `model.safetensors` into `folder` and return the files written.

    `weights` as for `export_diffusers`. The base weights are read from the model's files again, in the precision that
    they were published in, and keep it; sums are made in fp32. Names are those of the original repository.
    """
    files = family.weight_files()
    unet = load_file(files["unet/diffusion_pytorch_model.safetensors"])
    _merge(unet, weights, spec.lora or LoRA())
    tensors = _renamed(unet, original_names.unet(unet))
    vae = load_file(files["vae/diffusion_pytorch_model.safetensors"])
    tensors |= {name: _as_convolution(name, value) for name, value in _renamed(vae, original_names.vae(vae)).items()}
    text = load_file(files["text_encoder/model.safetensors"])
    tensors |= _renamed(text, original_names.text(text))
    positions = tensors[original_names.TEXT + "embeddings.position_embedding.weight"].shape[0]
    tensors[_POSITIONS] = torch.arange(positions)[None]  # a buffer that loaders of that time insist on
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    tensorfile.write(path, tensors, _metadata(spec))
    return [path]


def _merge(unet: dict[str, torch.Tensor], weights: Mapping[str, torch.Tensor], lora: LoRA) -> None:
    """Add alpha / rank * B @ A to each adapted weight."""
    for module in modules(weights):
        name = f"{module}.weight"
        down, up = (weights[module + part].detach().cpu().float() for part in (DOWN, UP))
        unet[name] = (unet[name].float() + lora.alpha / lora.rank * (up @ down)).to(unet[name].dtype)


def _renamed(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    return {names[name]: tensor for name, tensor in tensors.items()}


def _as_convolution(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the weight of the VAE's attention as the 1x1 convolution that it was."""
    return tensor[:, :, None, None] if ".mid.attn_1." in name and tensor.ndim == 2 else tensor


def _metadata(spec: TrainerSpec) -> dict[str, str]:
    resolution = spec.dataset.resolution
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.title": "Stable Diffusion 1 with LoRA merged",
    }
