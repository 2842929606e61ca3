"""From a folder to a family."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion_api.job import TrainerSpec
from diffusion_trainer.models.base import Family
from diffusion_trainer.models.inspection import check_fit, trainable_family
from diffusion_trainer.objective import process_as_asked


def open_model(folder: Path, spec: TrainerSpec, *, device: torch.device | str, dtype: torch.dtype) -> Family:
    """Load a model from a local folder in diffusers layout. Nothing is fetched from anywhere.

    The folder is checked before anything is loaded. `dtype` is that of the forward pass and of a denoiser that stays
    frozen; one whose weights are trained is loaded in fp32. Encoders are always fp32.

    Raises:
        InputMissing: a file or component is missing.
        BadData: a file that may not be there, a class that is not on the list, another family than the spec's.
        BadConfig: the spec asks for an objective that is not defined for the model.

    """
    check_fit(trainable_family(folder, spec.model), spec)
    # Here, because importing diffusers takes seconds and a refusal needs none of it.
    from diffusion_trainer.models.sd1 import open_sd1

    weights_dtype = torch.float32 if spec.trains == "Weights" else dtype  # trained weights are never rounded
    family = open_sd1(folder, device=torch.device(device), dtype=weights_dtype)
    family.dtype = dtype
    family.process = process_as_asked(family.process, spec.training.objective)
    return family
