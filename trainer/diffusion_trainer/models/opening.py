"""From a folder to a family."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion_api.job import TrainerSpec
from diffusion_trainer.models.base import Family
from diffusion_trainer.models.inspection import trainable_family
from diffusion_trainer.objective import process_as_asked


def open_model(folder: Path, spec: TrainerSpec, *, device: torch.device | str, dtype: torch.dtype) -> Family:
    """Load a model from a local folder in diffusers layout. Nothing is fetched from anywhere.

    The folder is checked before anything is loaded. `dtype` is that of the denoiser; encoders are always fp32.

    Raises:
        InputMissing: a file or component is missing.
        BadData: a file that may not be there, a class that is not on the list, another family than the spec's.
        BadConfig: the spec asks for an objective that is not defined for the model.

    """
    trainable_family(folder, spec.model)
    # Here, because importing diffusers takes seconds and a refusal needs none of it.
    from diffusion_trainer.models.sd1 import open_sd1

    family = open_sd1(folder, device=torch.device(device), dtype=dtype)
    family.process = process_as_asked(family.process, spec.training.objective)
    return family
