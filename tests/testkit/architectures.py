"""The networks of published checkpoints, from their own config.json, to be built on torch's meta device.

Sources: stable-diffusion-v1-5, stable-diffusion-2-1, stable-diffusion-xl-base-1.0, stable-diffusion-3-medium,
stable-diffusion-3.5-medium and -large, google/ddpm-celebahq-256 (also diffusers' script for unconditional training).
"""

from __future__ import annotations

from typing import Any

_CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
_SD3 = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64}
_SD3_TEXT = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
}

DENOISERS: dict[str, dict[str, Any]] = {
    "SD1": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": _CROSS_DOWN,
        "up_block_types": _CROSS_UP,
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "SD2": {
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": _CROSS_DOWN,
        "up_block_types": _CROSS_UP,
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "SD3-medium": {
        **_SD3,
        **_SD3_TEXT,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "SD3.5-medium": {
        **_SD3,
        **_SD3_TEXT,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    "SD3.5-large": {
        **_SD3,
        **_SD3_TEXT,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    "UNet2D": {
        "sample_size": 256,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        "layers_per_block": 2,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
}
TEXT_LENGTHS = {"SD1": 77, "SD2": 77, "SDXL": 77, "SD3-medium": 333, "SD3.5-medium": 333, "SD3.5-large": 333}
"""Tokens of the conditioning: CLIP's 77, and T5's 256 behind them."""
TEXT_WIDTHS = {"SD1": 768, "SD2": 1024, "SDXL": 2048, "SD3-medium": 4096, "SD3.5-medium": 4096, "SD3.5-large": 4096}
LATENT_CHANNELS = {"SD3-medium": 16, "SD3.5-medium": 16, "SD3.5-large": 16, "UNet2D": 3}
"""4 for the others; UNet2D works on pixels."""

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_SD3_ENCODERS = (
    ("CLIPTextModelWithProjection", _CLIP_L),
    ("CLIPTextModelWithProjection", _CLIP_G),
    ("T5EncoderModel", _T5_XXL),
)
TEXT_ENCODERS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "SD1": (("CLIPTextModel", _CLIP_L),),
    "SD2": (("CLIPTextModel", _CLIP_H),),
    "SDXL": (("CLIPTextModel", _CLIP_L), ("CLIPTextModelWithProjection", _CLIP_G)),
    "SD3-medium": _SD3_ENCODERS,
    "SD3.5-medium": _SD3_ENCODERS,
    "SD3.5-large": _SD3_ENCODERS,
    "UNet2D": (),
}
"""Classes of transformers and their configurations, in the order of the pipeline's components."""


def denoiser(architecture: str) -> Any:
    """Return the denoiser, on the current default device (`with torch.device("meta")`)."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

    kind = SD3Transformer2DModel if architecture.startswith("SD3") else UNet2DConditionModel
    return (UNet2DModel if architecture == "UNet2D" else kind)(**DENOISERS[architecture])


def vae(architecture: str) -> Any:
    """Return the autoencoder; there is none for UNet2D."""
    from diffusers import AutoencoderKL

    if architecture.startswith("SD3"):
        return AutoencoderKL(**_VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    return AutoencoderKL(**_VAE, latent_channels=4)


def text_encoders(architecture: str) -> list[Any]:
    """Return the text encoders, in the order of the pipeline."""
    import transformers

    made = []
    for kind, config in TEXT_ENCODERS[architecture]:
        settings = (
            transformers.T5Config(**config) if kind == "T5EncoderModel" else transformers.CLIPTextConfig(**config)
        )
        made.append(getattr(transformers, kind)(settings))
    return made
