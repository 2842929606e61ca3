"""Weights for a denoiser of which there is a configuration alone, so that training can begin from nothing."""

from __future__ import annotations

from pathlib import Path

from diffusion_api.job import TrainerSpec
from diffusion_trainer import tensorfile
from diffusion_trainer.methods.from_scratch import initialise
from diffusion_trainer.models.inspection import TRAINABLE, check_files, read_json, trainable_family


def supply_denoiser(folder: Path, spec: TrainerSpec, *, seed: int) -> None:
    """Write random weights into a model that lacks its denoiser's, where the method begins with none.

    They are a function of the seed and of their names, so every attempt finds the same base model. A model with
    weights is left as it is.

    Raises:
        BadData, InputMissing: as loading would.

    """
    if not spec.begins_anywhere:
        return
    components = TRAINABLE[trainable_family(folder, spec.model)]
    name = "transformer" if "transformer" in components else "unet"
    if list((folder / name).glob("*.safetensors")):
        return
    path = folder / name / components[name].weights
    draft = path.with_suffix(".draft")
    path.parent.mkdir(exist_ok=True)
    path.touch()  # stands in while the rest is looked at: nothing is built from a configuration that was not
    try:
        check_files(folder, components)
    finally:
        path.unlink()
    import diffusers

    network = getattr(diffusers, components[name].kind).from_config(read_json(folder / name / "config.json"))
    initialise(network, seed=seed)
    tensorfile.write(draft, network.state_dict(), {"format": "pt"})
    draft.replace(path)
