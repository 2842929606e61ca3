"""From diffusers' names of weights to those of the original Stable Diffusion repository (single-file checkpoints).

The places of blocks are worked out from the names themselves, so that no table has to be right for every depth. Source:
CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py and model.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET, VAE = "model.diffusion_model.", "first_stage_model."

_BLOCK = re.compile(r"(?:(\w+)\.)?(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"(?:(\w+)\.)?mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",  # as published models have them
}


def unet(names: Iterable[str]) -> dict[str, str]:
    """Return the original name of each weight of a UNet. Raises ValueError for one that is none of a UNet's."""
    every = list(names)
    layers = 1 + max(int(found[5]) for found in _blocks(every) if (found[2], found[4]) == ("down", "resnets"))
    attended = {found[3] for found in _blocks(every) if (found[2], found[4]) == ("up", "attentions")}
    return {name: UNET + _unet(name, layers, attended) for name in every}


def vae(names: Iterable[str]) -> dict[str, str]:
    """Return the original name of each weight of a VAE. Raises ValueError for one that is no AutoencoderKL's."""
    every = list(names)
    depth = 1 + max(int(found[3]) for found in _blocks(every) if found[2] == "up")
    return {name: VAE + _vae(name, depth) for name in every}


def _blocks(names: Iterable[str]) -> list[re.Match[str]]:
    return [found for name in names if (found := _BLOCK.fullmatch(name))]


def _unet(name: str, layers: int, attended: set[str]) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if found := _MID.fullmatch(name):
        place = 2 * int(found[3]) + (found[2] == "attentions")
        return f"middle_block.{place}.{_renamed(found[4], _UNET_RESNET) if found[2] == 'resnets' else found[4]}"
    found = _BLOCK.fullmatch(name)
    if found is None:
        raise ValueError(f"export: {name} is no weight of a Stable Diffusion UNet")
    side, kind, rest = found[2], found[4], found[6]
    first = (layers + 1) * int(found[3])  # of the block, whose resnets (and attentions) have a place each
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if found[3] in attended else 1}.{rest}"
    place = first + int(found[5])
    blocks = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
    return f"{blocks}.0.{_renamed(rest, _UNET_RESNET)}" if kind == "resnets" else f"{blocks}.1.{rest}"


def _vae(name: str, depth: int) -> str:
    if found := _MID.fullmatch(name):
        if found[2] == "attentions":
            return f"{found[1]}.mid.attn_1.{_renamed(found[4], _VAE_ATTENTION)}"
        return f"{found[1]}.mid.block_{int(found[3]) + 1}.{_renamed(found[4], _VAE_RESNET)}"
    found = _BLOCK.fullmatch(name)
    if found is None:
        return name.replace("conv_norm_out", "norm_out")
    block = found[3] if found[2] == "down" else depth - 1 - int(found[3])  # counted from the pixels, both ways
    place = f"{found[1]}.{found[2]}.{block}"
    if found[4] in {"downsamplers", "upsamplers"}:
        return f"{place}.{found[4].removesuffix('rs')}.{found[6]}"
    return f"{place}.block.{found[5]}.{_renamed(found[6], _VAE_RESNET)}"


def _renamed(rest: str, names: dict[str, str]) -> str:
    module, _, parameter = rest.rpartition(".")
    return f"{names.get(module, module)}.{parameter}"
