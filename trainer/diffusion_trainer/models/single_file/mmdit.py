"""From the shapes in a single file of SD3 to the configurations of its transformer and of T5.

Of the transformer only the width of its heads is not in the shapes. Source: Stability-AI/sd3.5, mmditx.py and
sd3_infer.py, which reads its sizes from the same tensors.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from diffusion_trainer.models.single_file.header import Shapes, count
from diffusion_trainer.models.single_file.published import DENOISER, heads

_BLOCKS = f"{DENOISER}joint_blocks."
_PIXELS = 1024
_LATENT_SCALE = 8


def transformer(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of an SD3Transformer2DModel. Raises KeyError and ValueError for what is none."""
    width, channels, patch, _ = shapes[f"{DENOISER}x_embedder.proj.weight"]
    _, places, _ = shapes[f"{DENOISER}pos_embed"]
    if isqrt(places) ** 2 != places:
        raise ValueError(f"its pos_embed has {places} places, which is no square")
    layers = count(shapes, _BLOCKS)
    dual = [layer for layer in range(layers) if f"{_BLOCKS}{layer}.x_block.attn2.qkv.weight" in shapes]
    projection, text = shapes[f"{DENOISER}context_embedder.weight"]
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": _PIXELS // _LATENT_SCALE,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes[f"{DENOISER}final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "num_attention_heads": heads(width),
        "attention_head_dim": width // heads(width),
        "joint_attention_dim": text,
        "caption_projection_dim": projection,
        "pooled_projection_dim": shapes[f"{DENOISER}y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": isqrt(places),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if f"{_BLOCKS}0.x_block.attn.ln_q.weight" in shapes else None,
    }


def t5(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Return the configuration of a T5EncoderModel of version 1.1, as T5-XXL is. Raises KeyError for what is none."""
    words, width = shapes[f"{prefix}shared.weight"]
    first = f"{prefix}encoder.block.0.layer."
    buckets, attending = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": words,
        "d_model": width,
        "d_ff": shapes[f"{first}1.DenseReluDense.wi_0.weight"][0],
        "d_kv": shapes[f"{first}0.SelfAttention.q.weight"][0] // attending,
        "num_heads": attending,
        "num_layers": count(shapes, f"{prefix}encoder.block."),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
    }
