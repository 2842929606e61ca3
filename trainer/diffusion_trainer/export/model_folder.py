"""The whole model as a folder in diffusers layout, with the trained weights in it and everything else as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_trainer import tensorfile
from diffusion_trainer.export.components import denoiser_folder, model_folder, trained_components
from diffusion_trainer.models.base import Family
from diffusion_trainer.models.inspection import INDEX
from diffusion_trainer.objective import DiscreteProcess

_DENOISER, _TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
_SCHEDULER = "scheduler/scheduler_config.json"
_OF_THE_PROCESS = ("rescale_betas_zero_snr", "timestep_spacing")
"""What of a noise scheduler's configuration a job may have changed besides what is predicted."""
_END_IN_NOISE = {"DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}
"""Schedulers of diffusers that know schedules without terminal signal; DDIMScheduler takes the place of others."""
_AS_STABLE_DIFFUSION = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
_PREDICTIONS = {"Epsilon": "epsilon", "VPrediction": "v_prediction", "Sample": "sample"}


def export_model_folder(
    weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec, *, folder: Path
) -> list[Path]:
    """Write the model into `folder` and return the files written, in their order.

    Trained components are fp32. The noise scheduler's configuration says what the denoiser was trained to predict, and
    on which noise schedule, where that is not the model's own.
    """
    base = model_folder(family)
    made = trained_components(weights, family, spec)
    weight_files = family.weight_files()
    written = []
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        replaced = relative.parts[0] in made and (str(relative) in weight_files or path.name.endswith(".index.json"))
        if path.is_file() and not replaced:
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            written.append(target)
    _correct_scheduler(folder, family)
    for component, tensors in made.items():
        target = folder / component / (_DENOISER if component == denoiser_folder(family) else _TEXT)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensorfile.write(target, tensors, {"format": "pt"})
        written.append(target)
    return sorted(written)


def _correct_scheduler(folder: Path, family: Family) -> None:
    process = family.process
    if not isinstance(process, DiscreteProcess):
        return
    path, index = folder / _SCHEDULER, folder / INDEX
    config = json.loads(path.read_text())
    wanted = config | {name: process.config[name] for name in _OF_THE_PROCESS if name in process.config}
    predicted = _PREDICTIONS[process.prediction_type]
    if config.get("prediction_type", "epsilon") != predicted:
        wanted["prediction_type"] = predicted
    rescaled = wanted.get("rescale_betas_zero_snr") and not config.get("rescale_betas_zero_snr")
    if rescaled and wanted.get("_class_name") not in _END_IN_NOISE:
        wanted = _AS_STABLE_DIFFUSION | wanted | {"_class_name": "DDIMScheduler"}
        _rewrite(index, json.loads(index.read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]})
    if wanted != config:
        _rewrite(path, wanted)


def _rewrite(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
