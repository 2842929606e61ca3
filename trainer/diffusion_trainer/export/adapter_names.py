"""From the names of adapter parameters to those of other programs. Our own maps, checked against golden lists.

diffusers' converter to kohya's format is not used: it writes alpha = rank whatever alpha is
(`convert_state_dict_to_kohya`).
"""

from __future__ import annotations

from collections.abc import Iterable

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def modules(weights: Iterable[str]) -> list[str]:
    """Return the module paths that have an adapter, sorted. Raises ValueError unless each has exactly a pair."""
    found = set(weights)
    paths = sorted({name.removesuffix(DOWN) for name in found if name.endswith(DOWN)})
    if found != {path + suffix for path in paths for suffix in (DOWN, UP)}:
        raise ValueError("export: the weights are not pairs of lora_A and lora_B")
    return paths


def kohya_unet(module: str) -> str:
    """Return kohya's name of a UNet module: its path with underscores. Rule of sd-scripts, networks/lora.py."""
    return "lora_unet_" + module.replace(".", "_")
