"""From a folder to a family."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusion_api.job import TrainerSpec

from diffusion_trainer.models.base import Family


def open_model(folder: Path, spec: TrainerSpec, *, device: torch.device | str, dtype: torch.dtype) -> Family:
    """Load a model from a local folder in diffusers layout. Nothing is fetched from anywhere.

    The folder is checked before anything is loaded. `dtype` is that of the denoiser; encoders are always fp32.

    Raises:
        InputMissing: a file or component is missing.
        BadData: a file that may not be there, a class that is not on the list, another family than the spec's.

    """
    raise NotImplementedError
