"""A model of every family, small enough for tests, of the real classes and in the published layouts.

`make_tiny(architecture, folder)` writes one of ARCHITECTURES; `testkit.tiny` has SD1 and the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from testkit.tiny import SCHEDULER, UNET, VAE, make_tiny_sd1, text_config, vocabulary, write_tokenizer

Architecture = Literal["SD1", "SD2", "SD2-v", "SDXL", "SD3", "SD3.5", "UNet2D"]
FAMILY_OF = {
    "SD1": "SD1", "SD2": "SD2", "SD2-v": "SD2", "SDXL": "SDXL", "SD3": "SD3", "SD3.5": "SD3", "UNet2D": "UNet2D",
}  # fmt: skip
"""Family in the API of each; SD2-v predicts v as the models of 768 px do."""

_WIDTHS = (32, 48)
"""Of the two CLIP text encoders; the pooled text is as wide as the second one's projection, 40."""
_PROJECTION = 40
_SDXL_UNET: dict[str, Any] = {
    **UNET,
    "cross_attention_dim": sum(_WIDTHS),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + _PROJECTION,
}
_T5_WIDTH = 96
_MMDIT: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": _T5_WIDTH,
    "pooled_projection_dim": _WIDTHS[0] + _PROJECTION,
    "pos_embed_max_size": 16,
}
_MMDIT_35 = {**_MMDIT, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
VAE_16 = {
    **VAE,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_FLOW = {"num_train_timesteps": 1000, "shift": 3.0}
_PIXELS: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


def make_tiny(architecture: Architecture, folder: Path, *, seed: int = 0) -> Path:
    """Write a model in diffusers layout, the same bytes for the same arguments, and return the folder."""
    import torch

    if architecture == "SD1":
        return make_tiny_sd1(folder, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _MAKERS[architecture](folder)
    return folder


def _sd2(folder: Path, prediction: str = "epsilon") -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNET | {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    _save(folder, unet=UNet2DConditionModel(**unet), vae=AutoencoderKL(**VAE))
    _save(folder, text_encoder=CLIPTextModel(text_config(32, hidden_act="gelu", num_hidden_layers=3)))
    DDIMScheduler(**_ddim(prediction_type=prediction)).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", pad="!")
    _write_index(folder, "StableDiffusionPipeline", tokenizers=1, scheduler="DDIMScheduler")


def _sd2_v(folder: Path) -> None:
    _sd2(folder, "v_prediction")


def _sdxl(folder: Path) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    second = text_config(_WIDTHS[1], hidden_act="gelu", num_hidden_layers=3, projection_dim=_PROJECTION)
    _save(
        folder,
        unet=UNet2DConditionModel(**_SDXL_UNET),
        vae=AutoencoderKL(**VAE | {"scaling_factor": 0.13025, "force_upcast": True}),
        text_encoder=CLIPTextModel(text_config(_WIDTHS[0])),
        text_encoder_2=CLIPTextModelWithProjection(second),
    )
    scheduler = {key: value for key, value in SCHEDULER.items() if key not in {"skip_prk_steps", "set_alpha_to_one"}}
    EulerDiscreteScheduler(**scheduler, timestep_spacing="leading").save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad="!")
    _write_index(folder, "StableDiffusionXLPipeline", tokenizers=2, scheduler="EulerDiscreteScheduler")


def _sd3(folder: Path, transformer: Mapping[str, Any] | None = None) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    t5 = T5Config(
        vocab_size=len(T5_VOCABULARY), d_model=_T5_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, is_encoder_decoder=False,
    )  # fmt: skip
    first = text_config(_WIDTHS[0], projection_dim=_WIDTHS[0])
    second = text_config(_WIDTHS[1], hidden_act="gelu", num_hidden_layers=3, projection_dim=_PROJECTION)
    _save(
        folder,
        transformer=SD3Transformer2DModel(**transformer or _MMDIT),
        vae=AutoencoderKL(**VAE_16),
        text_encoder=CLIPTextModelWithProjection(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        text_encoder_3=T5EncoderModel(t5),
    )
    FlowMatchEulerDiscreteScheduler(**_FLOW).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad="!")
    write_t5_tokenizer(folder / "tokenizer_3")
    _write_index(folder, "StableDiffusion3Pipeline", tokenizers=3, scheduler="FlowMatchEulerDiscreteScheduler")


def _sd35(folder: Path) -> None:
    _sd3(folder, _MMDIT_35)


def _unet2d(folder: Path) -> None:
    from diffusers import DDPMScheduler, UNet2DModel

    _save(folder, unet=UNet2DModel(**_PIXELS))
    DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").save_pretrained(folder / "scheduler")
    _write_index(folder, "DDPMPipeline", tokenizers=0, scheduler="DDPMScheduler")


_MAKERS: dict[str, Callable[[Path], None]] = {
    "SD2": _sd2,
    "SD2-v": _sd2_v,
    "SDXL": _sdxl,
    "SD3": _sd3,
    "SD3.5": _sd35,
    "UNet2D": _unet2d,
}


def _save(folder: Path, **components: Any) -> None:
    for name, component in components.items():
        component.save_pretrained(folder / name, safe_serialization=True)


def _ddim(**changes: Any) -> dict[str, Any]:
    return (
        {key: value for key, value in SCHEDULER.items() if key != "skip_prk_steps"} | {"clip_sample": False} | changes
    )


def _write_index(folder: Path, pipeline: str, *, tokenizers: int, scheduler: str) -> None:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.30.0"}
    index["scheduler"] = ["diffusers", scheduler]
    for network in ("unet", "transformer", "vae"):
        if (folder / network).is_dir():
            kind = json.loads((folder / network / "config.json").read_text())["_class_name"]
            index[network] = ["diffusers", kind]
    for number in range(1, tokenizers + 1):
        suffix = f"_{number}" if number > 1 else ""
        kind = json.loads((folder / f"text_encoder{suffix}" / "config.json").read_text())["architectures"][0]
        index[f"text_encoder{suffix}"] = ["transformers", kind]
        index[f"tokenizer{suffix}"] = ["transformers", "T5TokenizerFast" if kind.startswith("T5") else "CLIPTokenizer"]
    if pipeline == "StableDiffusionPipeline":
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None]}
    if pipeline == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


T5_VOCABULARY = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -2.0),
    *((letter, -3.0) for letter in sorted(vocabulary()) if len(letter) == 1),
]


def write_t5_tokenizer(folder: Path) -> None:
    """Write a tokenizer of letters, as T5's."""
    from transformers import T5Tokenizer

    T5Tokenizer(vocab=T5_VOCABULARY, extra_ids=0, model_max_length=512).save_pretrained(folder)
