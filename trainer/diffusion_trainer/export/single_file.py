"""The whole model in one file, as AUTOMATIC1111 and ComfyUI load it, with what was trained in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_api.memory import architecture_of
from diffusion_api.memory_table import Architecture
from diffusion_api.model import Family as FamilyName
from diffusion_trainer import tensorfile
from diffusion_trainer.export import original_names
from diffusion_trainer.export.components import Component, denoiser_folder, published, trained_components
from diffusion_trainer.export.original_mmdit import mmdit
from diffusion_trainer.export.original_text import clip, open_clip
from diffusion_trainer.models.base import Family
from diffusion_trainer.objective import DiscreteProcess

FILE = "model.safetensors"
_POSITIONS = "embeddings.position_ids"
_ARCHITECTURES: dict[FamilyName, str] = {
    "SD1": "stable-diffusion-v1",
    "SD2": "stable-diffusion-v2-512",
    "SDXL": "stable-diffusion-xl-v1-base",
    "SD3": "stable-diffusion-3",
}
_SD3: dict[Architecture | None, str] = {
    "SD3-medium": "stable-diffusion-v3-medium",
    "SD3.5-medium": "stable-diffusion-v3.5-medium",
    "SD3.5-large": "stable-diffusion-v3.5-large",
}
"""As SwarmUI knows them (T2IModelClassSorter.cs) and the published files say."""


def export_single_file(weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec, *, folder: Path) -> list[Path]:
    """Write `model.safetensors` into `folder` and return the files written.

    `weights` as for the other formats. What was not trained is read from the model's files again, in the precision that
    it was published in, and keeps it; adapters are added in fp32. Names are those of the original repositories.
    """
    trained = trained_components(weights, family, spec)
    names = dict.fromkeys([denoiser_folder(family), "vae", *family.text_encoders])
    content = _markers(family)
    for component in names:
        tensors = trained[component] if component in trained else published(family, component)
        content |= _original(component, family.name)(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    tensorfile.write(path, content, _metadata(family, spec))
    return [path]


def _markers(family: Family) -> Component:
    """Return the empty tensors by which programs know a model that predicts v where its family predicts the noise.

    ComfyUI looks for them in SDXL (`comfy/supported_models.py`), `models/single_file` in any; SD2 is known by itself.
    """
    process = family.process
    if not isinstance(process, DiscreteProcess) or process.prediction_type != "VPrediction" or family.name == "SD2":
        return {}
    ends_in_noise = process.alphas_cumprod[-1] == 0
    return {name: torch.empty(0) for name in (("v_pred", "ztsnr") if ends_in_noise else ("v_pred",))}


def architecture(family: Family) -> str:
    """Return the family's name in Stability's model specification."""
    name = _ARCHITECTURES[family.name]
    if family.name == "SD3":
        network: Any = family.denoiser  # torch's type knows nothing of configurations
        return _SD3.get(architecture_of(network.config), name)
    v_prediction = family.name == "SD2" and getattr(family.process, "prediction_type", "") == "VPrediction"
    return "stable-diffusion-v2-768-v" if v_prediction else name


def _original(component: str, family: FamilyName) -> Callable[[Component], Component]:
    """Return what gives a component of a family its original names and shapes."""
    if component == "vae":
        return _vae
    if component == "unet":
        return _unet
    if component == "transformer":
        return mmdit
    return _TEXTS[family, component]


def _unet(tensors: Component) -> Component:
    return _renamed(tensors, original_names.unet(tensors))


def _vae(tensors: Component) -> Component:
    named = _renamed(tensors, original_names.vae(tensors))
    return {name: _as_convolution(name, value) for name, value in named.items()}


def _sd1_text(tensors: Component) -> Component:
    prefix = "cond_stage_model.transformer."
    named = clip(tensors, prefix)
    positions = len(named[f"{prefix}text_model.embeddings.position_embedding.weight"])
    # A buffer that loaders of that time insist on.
    return named | {f"{prefix}text_model.{_POSITIONS}": torch.arange(positions)[None]}


_TEXTS: dict[tuple[FamilyName, str], Callable[[Component], Component]] = {
    ("SD1", "text_encoder"): _sd1_text,
    ("SD2", "text_encoder"): lambda tensors: open_clip(tensors, "cond_stage_model.model."),
    ("SDXL", "text_encoder"): lambda tensors: clip(tensors, "conditioner.embedders.0.transformer."),
    ("SDXL", "text_encoder_2"): lambda tensors: open_clip(tensors, "conditioner.embedders.1.model."),
    ("SD3", "text_encoder"): lambda tensors: clip(tensors, "text_encoders.clip_l.transformer."),
    ("SD3", "text_encoder_2"): lambda tensors: clip(tensors, "text_encoders.clip_g.transformer."),
    ("SD3", "text_encoder_3"): lambda tensors: {
        f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in tensors.items()
    },
}


def _renamed(tensors: Component, names: Mapping[str, str]) -> Component:
    return {names[name]: tensor for name, tensor in tensors.items()}


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """Return the weight of the VAE's attention as the 1x1 convolution that it was."""
    return tensor[:, :, None, None] if ".mid.attn_1." in name and tensor.ndim == 2 else tensor


def _metadata(family: Family, spec: TrainerSpec) -> dict[str, str]:
    resolution = spec.dataset.resolution
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(family),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.title": f"{family.name}, {spec.method}" + (", merged" if spec.trains == "Adapter" else ""),
    }
