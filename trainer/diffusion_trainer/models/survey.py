"""A look at a model without its weights: the checks of `inspection` on its configurations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from diffusion_api.memory import architecture_of
from diffusion_api.memory_table import Architecture
from diffusion_api.model import Family as FamilyName
from diffusion_api.model import Model
from diffusion_trainer.errors import InputMissing
from diffusion_trainer.models.fetching import wanted_files
from diffusion_trainer.models.inspection import (
    SCHEDULER,
    TRAINABLE,
    check_files,
    check_networks,
    read_json,
    trainable_family,
)
from diffusion_trainer.models.sources import Source
from diffusion_trainer.objectstore.parallel import in_parallel

_PARALLEL = 8
_SHOWN = 3
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack")
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
    try:
        check_files(folder, TRAINABLE[family])
    except InputMissing as error:
        raise InputMissing(f"{error}{_weights_elsewhere(source, wanted, family)}") from error
    check_networks(folder, family)
    configs = (folder / name / "config.json" for name in _DENOISERS)
    config = next((read_json(path) for path in configs if path.is_file()), {})
    noise = read_json(folder / SCHEDULER)
    predicts = "" if family == "SD3" else str(noise.get("prediction_type", "epsilon"))
    return Found(family, architecture_of(config), predicts)


def _weights_elsewhere(source: Source, wanted: Collection[str], family: FamilyName) -> str:
    """Return which weights are there by other names, where a component has none of those that are read."""
    places = {name: f"{name}/" for name, component in TRAINABLE[family].items() if component.weights}
    bare = tuple(place for place in places.values() if not any(_is_of(key, place) for key in wanted))
    found = sorted(info.key for info in source.list() if bare and _is_of(info.key, bare, _WEIGHTS))
    if not found:
        return ""
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    return (
        f". The model has {shown}, which are not read: variants such as .fp16 are copied to names without the variant "
        "(load them with variant='fp16' and save_pretrained), pickles have to be converted"
    )


def _is_of(key: str, places: str | tuple[str, ...], endings: tuple[str, ...] = (".safetensors",)) -> bool:
    return key.startswith(places) and key.endswith(endings)
