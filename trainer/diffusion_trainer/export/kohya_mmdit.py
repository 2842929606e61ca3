"""Adapters of SD3 by kohya's names: those of the original network, whose queries, keys and values are one layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_FUSED = {
    "attn.to_q": ("x_block_attn_qkv", 0),
    "attn.to_k": ("x_block_attn_qkv", 1),
    "attn.to_v": ("x_block_attn_qkv", 2),
    "attn.add_q_proj": ("context_block_attn_qkv", 0),
    "attn.add_k_proj": ("context_block_attn_qkv", 1),
    "attn.add_v_proj": ("context_block_attn_qkv", 2),
    "attn2.to_q": ("x_block_attn2_qkv", 0),
    "attn2.to_k": ("x_block_attn2_qkv", 1),
    "attn2.to_v": ("x_block_attn2_qkv", 2),
}
_PLAIN = {
    "attn.to_out.0": "x_block_attn_proj",
    "attn.to_add_out": "context_block_attn_proj",
    "attn2.to_out.0": "x_block_attn2_proj",
    "ff.net.0.proj": "x_block_mlp_fc1",
    "ff.net.2": "x_block_mlp_fc2",
    "ff_context.net.0.proj": "context_block_mlp_fc1",
    "ff_context.net.2": "context_block_mlp_fc2",
}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


class Adapter(NamedTuple):
    """One adapter: down [rank, in], up [out, rank], DoRA's magnitudes [out], and what alpha is multiplied by."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None
    alpha_factor: int = 1


def kohya_mmdit(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return adapters of diffusers' modules by kohya's names (sd-scripts, networks/lora_sd3.py).

    Adapters of queries, keys and values become one of three times the rank, whose up is block-diagonal; its alpha is
    three times as large, too, so that alpha / rank stays.

    Raises:
        ValueError: for a module that is not among them, or a layer of which a third is missing.

    """
    found: dict[str, Adapter] = {}
    fused: dict[str, dict[int, Adapter]] = {}
    for path, adapter in adapters.items():
        block = _BLOCK.fullmatch(path)
        inside = block[2] if block else ""
        if block and inside in _PLAIN:
            found[f"lora_unet_joint_blocks_{block[1]}_{_PLAIN[inside]}"] = adapter
        elif block and inside in _FUSED:
            name, third = _FUSED[inside]
            fused.setdefault(f"lora_unet_joint_blocks_{block[1]}_{name}", {})[third] = adapter
        else:
            raise ValueError(f"export: {path} has no name in kohya's format")
    for name, thirds in fused.items():
        if set(thirds) != {0, 1, 2}:
            raise ValueError(f"export: {name} needs adapters of queries, keys and values")
        found[name] = _stacked([thirds[third] for third in range(3)])
    return found


def _stacked(thirds: list[Adapter]) -> Adapter:
    magnitudes = [third.magnitude for third in thirds if third.magnitude is not None]
    return Adapter(
        torch.cat([third.down for third in thirds]),
        torch.block_diag(*(third.up for third in thirds)),
        torch.cat(magnitudes) if magnitudes else None,
        alpha_factor=3,
    )
