"""A component's weights out of a single file, by diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from diffusion_trainer import tensorfile
from diffusion_trainer.errors import BadData
from diffusion_trainer.models.single_file.configurations import UNET, VAE
from diffusion_trainer.objectstore.atomic import draft


def write_component(original: Path, prefix: str, *, config: Mapping[str, Any], path: Path) -> None:
    """Write the component below `prefix` to `path`, in the precision that it has, whole or not at all.

    `config` is the component's configuration. Raises `BadData` when the file cannot be read, or a weight of the UNet or
    the VAE has no place in the network that the configuration describes; what is missing is found out by loading.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(original), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            converted = _converted(tensors, prefix, config)
            _check_complete(converted, prefix, config)
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft(path) as made:
                tensorfile.write(made.path, {n: t.contiguous() for n, t in converted.items()}, {"format": "pt"})
                made.path.replace(path)
    except (SafetensorError, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise BadData(
            f"model.source: {prefix}* of the single file cannot be converted ({error}); replace it by the "
            "original file, or use a folder in diffusers layout"
        ) from error


def _converted(tensors: dict[str, Tensor], prefix: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders import single_file_utils as convert

    if prefix == UNET:
        return dict(convert.convert_ldm_unet_checkpoint(tensors, config))
    if prefix == VAE:
        return dict(convert.convert_ldm_vae_checkpoint(tensors, config))
    if not prefix.endswith(".model."):
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    else:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        named = dict(convert.convert_open_clip_checkpoint(model, tensors, prefix=prefix))
    return {name: tensor for name, tensor in named.items() if not name.endswith("position_ids")}


def _check_complete(converted: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any]) -> None:
    import diffusers
    import torch

    if prefix not in {UNET, VAE}:
        return
    kind = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        places = kind.from_config(dict(config)).state_dict()
    wrong = sorted(converted.keys() ^ places.keys())
    if wrong:
        raise KeyError(f"{len(wrong)} weights differ from those of the published network, e.g. {wrong[0]}")
