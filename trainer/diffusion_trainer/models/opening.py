"""From a folder to a family."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch

from diffusion_api.job import TrainerSpec
from diffusion_trainer.models.base import Family
from diffusion_trainer.models.files import ModelFiles
from diffusion_trainer.models.inspection import (
    TRAINABLE,
    check_files,
    check_fit,
    check_networks,
    says_nothing,
    trainable_family,
)
from diffusion_trainer.objective import process_as_asked, process_as_published

_FAMILIES = {
    "SD1": ("sd1", "StableDiffusion1"),
    "SD2": ("sd2", "StableDiffusion2"),
    "SDXL": ("sdxl", "StableDiffusionXL"),
    "SD3": ("sd3", "StableDiffusion3"),
    "UNet2D": ("unet2d", "UnconditionalUNet"),
}


def open_model(folder: Path, spec: TrainerSpec, *, device: torch.device | str, dtype: torch.dtype) -> Family:
    """Load a model from a local folder in diffusers layout. Nothing is fetched from anywhere.

    The folder is checked before anything is loaded. `dtype` is that of the forward pass and of a denoiser that stays
    frozen; one whose weights are trained is loaded in fp32. Encoders are always fp32, T5 apart, which is in `dtype`.

    Raises:
        InputMissing: a file or component is missing.
        BadData: a file that may not be there, a class that is not on the list, another family than the spec's.
        BadConfig: the spec asks for an objective that is not defined for the model.

    """
    found = trainable_family(folder, spec.model)
    check_fit(found, spec)
    files = ModelFiles(folder, check_files(folder, TRAINABLE[found]))
    check_networks(folder, found)
    # Here, because importing diffusers takes seconds and a refusal needs none of it.
    room, kind = _FAMILIES[found]
    family: Any = getattr(import_module(f"diffusion_trainer.models.{room}"), kind)
    weights_dtype = torch.float32 if spec.trains == "Weights" else dtype  # trained weights are never rounded
    opened = family(files, device=torch.device(device), dtype=dtype, weights_dtype=weights_dtype)
    asked = spec.training.objective
    opened.published = process_as_published(opened.process, asked, silent=says_nothing(found, spec))
    opened.process = process_as_asked(opened.process, asked)
    return cast("Family", opened)
