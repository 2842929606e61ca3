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
from diffusion_trainer.objective import DiscreteProcess

_DENOISER, _TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
_SCHEDULER = "scheduler/scheduler_config.json"
_PREDICTIONS = {"Epsilon": "epsilon", "VPrediction": "v_prediction", "Sample": "sample"}


def export_model_folder(
    weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec, *, folder: Path
) -> list[Path]:
    """Write the model into `folder` and return the files written, in their order.

    Trained components are fp32. The noise scheduler's configuration says what the denoiser was trained to predict,
    where that is not what the model predicted before.
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
    _correct_scheduler(folder / _SCHEDULER, family)
    for component, tensors in made.items():
        target = folder / component / (_DENOISER if component == denoiser_folder(family) else _TEXT)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensorfile.write(target, tensors, {"format": "pt"})
        written.append(target)
    return sorted(written)


def _correct_scheduler(path: Path, family: Family) -> None:
    if not isinstance(family.process, DiscreteProcess):
        return
    config = json.loads(path.read_text())
    predicted = _PREDICTIONS[family.process.prediction_type]
    if config.get("prediction_type", "epsilon") != predicted:
        path.write_text(json.dumps(config | {"prediction_type": predicted}, indent=2) + "\n")
