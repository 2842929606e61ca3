"""The parts of a model in diffusers layout, by their folders: as published, and with what was trained in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_trainer.export.merging import merge
from diffusion_trainer.models.base import Family

Component = dict[str, Tensor]
_TEXT_MODEL = "text_model."


def denoiser_folder(family: Family) -> str:
    """Return the folder of the denoiser."""
    return "transformer" if family.name == "SD3" else "unet"


def model_folder(family: Family) -> Path:
    """Return the folder of the model on this machine."""
    relative, path = next(iter(family.weight_files().items()))
    return path.parents[relative.count("/")]


def by_component(weights: Mapping[str, Tensor], family: Family) -> dict[str, Component]:
    """Return what was trained, by the folders of the model: those of the text encoders, and that of the denoiser."""
    found: dict[str, Component] = {}
    for name, tensor in weights.items():
        folder, _, path = name.partition(".")
        inside = (folder, path) if folder in family.text_encoders else (denoiser_folder(family), name)
        found.setdefault(inside[0], {})[inside[1]] = tensor.detach()
    return found


def published(family: Family, folder: str) -> Component:
    """Return the weights of one component as they were published: mapped from their files, not read yet."""
    files = [path for relative, path in family.weight_files().items() if relative.startswith(f"{folder}/")]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def trained_components(weights: Mapping[str, Tensor], family: Family, spec: TrainerSpec) -> dict[str, Component]:
    """Return the components that training changed, whole: adapters are merged in, weights replaced.

    Adapters leave a component in the precision that it was published in. A component with weights of its own in
    `weights` becomes fp32 as a whole.

    Raises:
        ValueError: a trained weight has no place in the component.

    """
    made = {}
    for folder, changed in by_component(weights, family).items():
        base = published(family, folder)
        trained = {_as_published(name, base): tensor for name, tensor in changed.items()}
        if spec.trains == "Adapter":
            merge(base, trained, spec.lora or LoRA())
            made[folder] = base
            continue
        if not base:  # a configuration alone was published
            parameters = {name for name, _ in family.denoiser.named_parameters()}
            base = {n: t for n, t in family.denoiser.state_dict().items() if n not in parameters} | trained
        if strangers := sorted(trained.keys() - base.keys()):
            raise ValueError(f"export: {strangers[0]} and {len(strangers) - 1} more are no weights of {folder}")
        made[folder] = {n: _single(trained.get(n, t).detach()) for n, t in base.items()}
    return made


def _single(tensor: Tensor) -> Tensor:
    """Return numbers as fp32, and positions of tokens, which published files hold, as the integers that they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _as_published(name: str, base: Component) -> str:
    """Return the name in the file: files of CLIP that were written since transformers 5.6 lack its prefix."""
    if name.startswith(_TEXT_MODEL) and base and not any(key.startswith(_TEXT_MODEL) for key in base):
        return name.removeprefix(_TEXT_MODEL)
    return name
