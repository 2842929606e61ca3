"""From the names of adapter parameters to those of other programs. Our own maps, checked against golden lists.

diffusers' converter to kohya's format is not used: it writes alpha = rank whatever alpha is
(`convert_state_dict_to_kohya`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.export import original_names
from diffusion_trainer.methods.lora import DOWN, MAGNITUDE, UP


def modules(weights: Iterable[str]) -> list[str]:
    """Return the module paths that have an adapter, sorted.

    Raises ValueError unless each has exactly a pair, and all or none have a magnitude.
    """
    found = set(weights)
    paths = sorted({name.removesuffix(DOWN) for name in found if name.endswith(DOWN)})
    parts = (DOWN, UP, MAGNITUDE) if any(name.endswith(MAGNITUDE) for name in found) else (DOWN, UP)
    if found != {path + suffix for path in paths for suffix in parts}:
        raise ValueError("export: the weights are not pairs of lora_A and lora_B")
    return paths


def kohya_denoiser(paths: Iterable[str], published: Mapping[str, object], family: FamilyName) -> dict[str, str]:
    """Return kohya's name of each module of a denoiser; `published` has the names of all its weights.

    sd-scripts, networks/lora.py: the path with underscores. SD1 and SD2 are trained as diffusers' networks there, SDXL
    as the original one, so that its names are those of the original repository.
    """
    if family != "SDXL":
        return {path: _with_underscores("lora_unet", path) for path in paths}
    names = original_names.unet(published)
    originals = {path: names[f"{path}.weight"].removeprefix(original_names.UNET) for path in paths}
    return {path: _with_underscores("lora_unet", name.removesuffix(".weight")) for path, name in originals.items()}


def kohya_text(folder: str, path: str, family: FamilyName) -> str:
    """Return kohya's name of a module of a text encoder; models with several number them."""
    number = folder.rpartition("_")[2] if folder[-1].isdigit() else "1"
    return _with_underscores("lora_te" if family in {"SD1", "SD2"} else f"lora_te{number}", path)


def _with_underscores(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"
