"""A look at a model without its weights: the checks of `inspection` on its configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusion_api.memory import architecture_of
from diffusion_api.memory_table import Architecture
from diffusion_api.model import Family as FamilyName
from diffusion_api.model import Model
from diffusion_trainer.models.fetching import wanted_files
from diffusion_trainer.models.inspection import SCHEDULER, TRAINABLE, check_files, read_json, trainable_family
from diffusion_trainer.models.sources import Source
from diffusion_trainer.objectstore.parallel import in_parallel

_PARALLEL = 8
_DENOISERS = ("unet", "transformer")


@dataclass(frozen=True, slots=True)
class Found:
    """The family of a model, and the published network that its denoiser is, None where it is another one.

    `predicts` is what its noise scheduler says of the denoiser, in diffusers' words.
    """

    family: FamilyName
    architecture: Architecture | None
    predicts: str = ""


def look_at(model: Model, source: Source, *, work: Path, complete: bool = True) -> Found:
    """Check a model's files by their names and configurations. Weights are not downloaded: an empty file stands in.

    Without `complete` the denoiser may lack its weights.

    Raises:
        BadData, InputMissing: as loading would, damage within weights apart.

    """
    folder = work / "model-survey"
    wanted = wanted_files(source)

    def fetch(key: str) -> None:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if key.endswith(".json"):
            source.get_to_file(key, path)
        else:
            path.touch()

    in_parallel(fetch, wanted, parallel=_PARALLEL)
    family = trainable_family(folder, model)
    for name in _DENOISERS:
        if not complete and name in TRAINABLE[family] and (folder / name).is_dir():
            (folder / name / TRAINABLE[family][name].weights).touch()
    check_files(folder, TRAINABLE[family])
    configs = (folder / name / "config.json" for name in _DENOISERS)
    config = next((read_json(path) for path in configs if path.is_file()), {})
    noise = read_json(folder / SCHEDULER)
    predicts = "" if family == "SD3" else str(noise.get("prediction_type", "epsilon"))
    return Found(family, architecture_of(config), predicts)
