"""SD3's transformer in single-file checkpoints: from diffusers' names to those of Stability's `mmditx.py`.

diffusers can only read that format; this is the way back, proven by its own reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "model.diffusion_model."
_ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_INSIDE = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FUSED = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
}
_ORDER = "qkv"
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")


def mmdit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the original names and weights of a transformer. Raises ValueError for what is no SD3 transformer's."""
    last = max(int(found[1]) for name in tensors if (found := _BLOCK.fullmatch(name)))
    made: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        if block and block[2] in _FUSED:
            fused = f"joint_blocks.{block[1]}.{_FUSED[block[2]]}.{block[3]}"
            letter = re.sub(r"^attn2?\.(to|add)_", "", block[2])[0]
            thirds.setdefault(fused, {})[letter] = tensor
        elif block and block[2] in _INSIDE:
            # In the last block the text's modulation has two parts only, and diffusers has them the other way round.
            swapped = block[2] == "norm1_context.linear" and int(block[1]) == last
            made[f"joint_blocks.{block[1]}.{_INSIDE[block[2]]}.{block[3]}"] = _swapped(tensor) if swapped else tensor
        else:
            path, dot, parameter = name.rpartition(".") if name not in _ENDS else (name, "", "")
            if path not in _ENDS:
                raise ValueError(f"export: {name} is no weight of SD3's transformer")
            made[_ENDS[path] + dot + parameter] = _swapped(tensor) if path == "norm_out.linear" else tensor
    made |= {name: torch.cat([parts[letter] for letter in _ORDER]) for name, parts in thirds.items()}
    return {PREFIX + name: tensor for name, tensor in made.items()}


def _swapped(tensor: Tensor) -> Tensor:
    """Return scale and shift, or shift and scale, in the other order."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
