"""Text encoders in single-file checkpoints: OpenCLIP's names, with queries, keys and values as one weight."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_INSIDE = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return CLIP's weights by transformers' older names, with `text_model.`, below a prefix."""
    return {prefix + _prefixed(name): tensor for name, tensor in tensors.items()}


def open_clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return CLIP's weights as OpenCLIP has them. Raises ValueError for one that is no CLIP text model's.

    Source: openai/CLIP, clip/model.py (nn.MultiheadAttention); the text projection is the transpose.
    """
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("text_model.")
        layer = _LAYER.fullmatch(path)
        if path == "text_projection.weight":
            found[f"{prefix}text_projection"] = tensor.T.contiguous()
        elif path in _ENDS:
            found[prefix + _ENDS[path]] = tensor
        elif layer and layer[2] in _INSIDE:
            found[f"{prefix}transformer.resblocks.{layer[1]}.{_INSIDE[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2] in _THIRDS:
            fused = f"{prefix}transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"
            thirds.setdefault(fused, {})[layer[2]] = tensor
        elif not path.endswith("position_ids"):
            raise ValueError(f"export: {name} is no weight of a CLIP text model")
    return found | {name: torch.cat([parts[third] for third in _THIRDS]) for name, parts in thirds.items()}


def _prefixed(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
