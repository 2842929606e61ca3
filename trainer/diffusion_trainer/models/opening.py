"""From a folder to a family."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion_api.job import TrainerSpec
from diffusion_trainer.errors import BadData
from diffusion_trainer.models.base import Family
from diffusion_trainer.models.inspection import family_of


def open_model(folder: Path, spec: TrainerSpec, *, device: torch.device | str, dtype: torch.dtype) -> Family:
    """Load a model from a local folder in diffusers layout. Nothing is fetched from anywhere.

    The folder is checked before anything is loaded. `dtype` is that of the denoiser; encoders are always fp32.

    Raises:
        InputMissing: a file or component is missing.
        BadData: a file that may not be there, a class that is not on the list, another family than the spec's.

    """
    found = family_of(folder)
    if spec.model.family not in {"Auto", found}:
        raise BadData(
            f"model.family is {spec.model.family}, but {spec.model.source} is {found}; use Auto, or another model"
        )
    if found != "SD1":
        raise BadData(f"model.source {spec.model.source} is {found}, which cannot be trained yet; use a model of SD1")
    # Here, because importing diffusers takes seconds and a refusal needs none of it.
    from diffusion_trainer.models.sd1 import open_sd1

    return open_sd1(folder, device=torch.device(device), dtype=dtype)
