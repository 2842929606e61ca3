"""A component's weights out of a single file, by diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer import tensorfile
from diffusion_trainer.errors import BadData
from diffusion_trainer.models.single_file.published import DENOISER, TEXTS, VAE
from diffusion_trainer.objectstore.atomic import draft

_CLIP_L, _T5 = TEXTS["SD3"]["text_encoder"], TEXTS["SD3"]["text_encoder_3"]
_T5_COPY = "encoder.embed_tokens.weight"
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def write_component(original: Path, prefix: str, *, config: Mapping[str, Any], path: Path, where: str) -> None:
    """Write the component below `prefix` to `path`, in the precision that it has, whole or not at all.

    Weights of 8 bits become bfloat16, which has all their values. `config` is the component's configuration; `where`
    names the file in messages. Raises `BadData` when the file cannot be read, or a weight of the denoiser or the VAE
    has no place in the network that the configuration describes; what is missing is found out by loading.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(original), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name: _widened(file.get_tensor(name)) for name in names}
            named = converted(tensors, prefix, config)
            _check_complete(named, prefix, config)
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft(path) as made:
                tensorfile.write(made.path, {n: t.contiguous() for n, t in named.items()}, {"format": "pt"})
                made.path.replace(path)
    except (SafetensorError, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise BadData(
            f"model.source {where}: {prefix}* of the single file cannot be converted ({error}); replace it by the "
            "original file, or use a folder in diffusers layout"
        ) from error


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.dtype in _EIGHT_BITS else tensor


def converted(tensors: dict[str, Tensor], prefix: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a component's weights by diffusers' names. Takes some of them out of `tensors`."""
    from diffusers.loaders import single_file_utils as convert

    if prefix == DENOISER and config["_class_name"] == "SD3Transformer2DModel":
        return _mmdit(tensors)
    if prefix == DENOISER:
        return dict(convert.convert_ldm_unet_checkpoint(tensors, config))
    if prefix == VAE:
        return dict(convert.convert_ldm_vae_checkpoint(tensors, config))
    if not prefix.endswith(".model."):
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    else:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        named = dict(convert.convert_open_clip_checkpoint(model, tensors, prefix=prefix))
    if prefix == _T5 and "shared.weight" in named:
        named.pop(_T5_COPY, None)
    if prefix == _CLIP_L:
        # Programs that read such files do not project this one's pooled text, whatever projection there is (ComfyUI,
        # comfy/text_encoders/sd3_clip.py: return_projected_pooled=False; diffusers' own reader does the same as here).
        named["text_projection.weight"] = torch.eye(config["hidden_size"], dtype=next(iter(named.values())).dtype)
    return {name: tensor for name, tensor in named.items() if not name.endswith("position_ids")}


def _mmdit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return SD3's transformer by diffusers' names, whose reader takes out what it knows and leaves the rest."""
    from diffusers.loaders import single_file_utils as convert

    named = dict(convert.convert_sd3_transformer_checkpoint_to_diffusers(tensors))
    if tensors:
        raise KeyError(f"{len(tensors)} weights differ from those of the published network, e.g. {min(tensors)}")
    return named


def _check_complete(named: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any]) -> None:
    import diffusers

    if prefix not in {DENOISER, VAE}:
        return
    kind = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        places = kind.from_config(dict(config)).state_dict()
    wrong = sorted(named.keys() ^ places.keys())
    if wrong:
        raise KeyError(f"{len(wrong)} weights differ from those of the published network, e.g. {wrong[0]}")
