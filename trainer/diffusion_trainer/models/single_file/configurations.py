"""From the shapes of a single file's tensors to the configurations of its components, as they are published.

Shapes do not say everything: numbers of heads and groups, factors and noise schedules are those of the published models
(CompVis/stable-diffusion, Stability-AI/stablediffusion and generative-models, configs/; the same in the folders at
huggingface.co that diffusers made from them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.errors import BadData
from diffusion_trainer.models.single_file.header import Shapes

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXTS: dict[FamilyName, dict[str, str]] = {
    "SD1": {"text_encoder": "cond_stage_model.transformer."},
    "SD2": {"text_encoder": "cond_stage_model.model."},
    "SDXL": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
"""Where the text encoders of each family are; below `.model.` by OpenCLIP's names."""
WORDS = 49408
_CLIP, _OPEN_CLIP = "text_model.embeddings.token_embedding.weight", "token_embedding.weight"
_HEAD_WIDTH = 64
_SD1_HEADS = 8
_GEOMETRY_NUMBERS = 6
_SD2_PUBLISHED_LAYERS = 24
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
_SCHEDULERS: dict[FamilyName, dict[str, Any]] = {
    "SD1": {"_class_name": "PNDMScheduler", **_NOISE, "skip_prk_steps": True, "set_alpha_to_one": False},
    "SD2": {"_class_name": "DDIMScheduler", **_NOISE, "set_alpha_to_one": False},
    "SDXL": {"_class_name": "EulerDiscreteScheduler", **_NOISE, "timestep_spacing": "leading"},
}
_PIPELINES: dict[FamilyName, str] = {
    "SD1": "StableDiffusionPipeline",
    "SD2": "StableDiffusionPipeline",
    "SDXL": "StableDiffusionXLPipeline",
}
_END, _OPEN_CLIP_PAD = "<|endoftext|>", "!"


def family_of(shapes: Shapes, *, where: str) -> FamilyName:
    """Return the family of a single file. Raises `BadData` for one of none, and for one without text encoders."""
    if any(name.startswith(f"{UNET}joint_blocks.") for name in shapes):
        raise BadData(
            f"model.source {where} is a single file of SD3, which are published without T5; use the model's folder in "
            "diffusers layout"
        )
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        raise BadData(
            f"model.source {where} is no whole model by the original names (it has no {UNET}input_blocks.0.0.weight): "
            "adapters, and files of a denoiser alone, are none; use a checkpoint of SD1, SD2 or SDXL, or a folder in "
            "diffusers layout"
        )
    families: tuple[FamilyName, ...] = ("SDXL", "SD2", "SD1")
    for family in families:
        if all(prefix + _first(prefix) in shapes for prefix in TEXTS[family].values()):
            return family
    raise BadData(
        f"model.source {where} holds a UNet without the text encoders of SD1, SD2 or SDXL base; use the whole "
        "checkpoint, or a folder in diffusers layout"
    )


def configurations(shapes: Shapes, *, where: str) -> dict[str, dict[str, Any]]:
    """Return the JSON files of the folder in diffusers layout, by their paths, the tokenizers' vocabularies apart.

    Raises `BadData` for a file that is no model of SD1, SD2 or SDXL, or lacks parts of one.
    """
    family = family_of(shapes, where=where)
    try:
        texts = {name: _text(shapes, prefix, family) for name, prefix in TEXTS[family].items()}
        found = {
            "unet/config.json": _unet(shapes, family),
            "vae/config.json": _vae(shapes, family),
            "scheduler/scheduler_config.json": _scheduler(shapes, family),
            **{f"{name}/config.json": text for name, text in texts.items()},
        }
    except KeyError as error:
        raise BadData(
            f"model.source {where} looks like {family} and has no {error.args[0]}; use the whole checkpoint"
        ) from error
    except (ValueError, IndexError) as error:
        raise BadData(
            f"model.source {where} looks like {family}, but {error}; use a folder in diffusers layout"
        ) from error
    for name, prefix in TEXTS[family].items():
        pad = _OPEN_CLIP_PAD if _is_open_clip(prefix) else _END
        found[f"{name.replace('text_encoder', 'tokenizer')}/tokenizer_config.json"] = _tokenizer(pad)
    return found | {"model_index.json": _index(family, texts, found["scheduler/scheduler_config.json"])}


def _unet(shapes: Shapes, family: FamilyName) -> dict[str, Any]:
    blocks = list(_blocks(shapes))
    channels = [width for width, _, _ in blocks]
    layers = {count for _, count, _ in blocks}
    if len(layers) != 1:
        raise ValueError(f"its UNet has blocks of {sorted(layers)} layers, where those of a published one are alike")
    depths = [depth for _, _, depth in blocks]
    middle = _count(shapes, f"{UNET}middle_block.1.transformer_blocks.")
    attention = next((name for name in shapes if name.startswith(UNET) and name.endswith(".attn2.to_k.weight")), "")
    if not attention or not middle:
        raise KeyError(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128 if family == "SDXL" else 64,
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers.pop(),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [depths[-1] or middle],
        "cross_attention_dim": shapes[attention][1],
        # Of that name, but diffusers takes it for the number of heads.
        "attention_head_dim": _SD1_HEADS if family == "SD1" else [_heads(width) for width in channels],
        "use_linear_projection": len(shapes[f"{UNET}middle_block.1.proj_in.weight"]) == 2,
    }
    if family == "SDXL":
        pooled = shapes[f"{TEXTS['SDXL']['text_encoder_2']}text_projection"][1]
        inputs = shapes[f"{UNET}label_emb.0.0.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (inputs - pooled) // _GEOMETRY_NUMBERS,
            "projection_class_embeddings_input_dim": inputs,
        }
    return config


def _blocks(shapes: Shapes) -> Iterator[tuple[int, int, int]]:
    """Yield the channels, the layers and the depth of the transformers (0 without) of each block on the way down."""
    place, width, count, depth = 1, 0, 0, 0
    while True:
        prefix = f"{UNET}input_blocks.{place}."
        resnet = shapes.get(f"{prefix}0.in_layers.2.weight")
        if resnet is None:
            if not count:
                raise KeyError(f"{prefix}0.in_layers.2.weight")
            yield width, count, depth
            if f"{prefix}0.op.weight" not in shapes:
                return
            width, count, depth = 0, 0, 0
        else:
            width, count = resnet[0], count + 1
            depth = max(depth, _count(shapes, f"{prefix}1.transformer_blocks."))
        place += 1


def _vae(shapes: Shapes, family: FamilyName) -> dict[str, Any]:
    depth = _count(shapes, f"{VAE}encoder.down.")
    if not depth:
        raise KeyError(f"{VAE}encoder.down.0.block.0.conv1.weight")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 1024 if family == "SDXL" else 512,
        "block_out_channels": [shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(depth)],
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "layers_per_block": _count(shapes, f"{VAE}encoder.down.0.block."),
        "latent_channels": shapes[f"{VAE}post_quant_conv.weight"][0],
        "scaling_factor": 0.13025 if family == "SDXL" else 0.18215,
        "force_upcast": family == "SDXL",
    }


def _text(shapes: Shapes, prefix: str, family: FamilyName) -> dict[str, Any]:
    opened = _is_open_clip(prefix)
    words, width = shapes[prefix + _first(prefix)]
    if words != WORDS:
        raise ValueError(f"its text encoder {prefix} has {words} words, where CLIP has {WORDS}")
    layers = f"{prefix}transformer.resblocks." if opened else f"{prefix}text_model.encoder.layers."
    inner = f"{layers}0.mlp.c_fc.weight" if opened else f"{layers}0.mlp.fc1.weight"
    places = f"{prefix}positional_embedding" if opened else f"{prefix}text_model.embeddings.position_embedding.weight"
    count = _count(shapes, layers)
    projected = family == "SDXL" and opened
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shapes[inner][0],
        # The last layer of SD2's is in the file, and never used.
        "num_hidden_layers": count - 1 if family == "SD2" and count == _SD2_PUBLISHED_LAYERS else count,
        "num_attention_heads": _heads(width),
        "max_position_embeddings": shapes[places][0],
        "projection_dim": shapes[f"{prefix}text_projection"][1] if projected else width,
        "hidden_act": "gelu" if opened else "quick_gelu",
        "bos_token_id": WORDS - 2,
        "eos_token_id": WORDS - 1,
        "pad_token_id": 1,
    }


def _scheduler(shapes: Shapes, family: FamilyName) -> dict[str, Any]:
    """Return the published schedule; a file with a tensor `v_pred` (and `ztsnr`) says that it was trained over."""
    return _SCHEDULERS[family] | {
        "prediction_type": "v_prediction" if "v_pred" in shapes else "epsilon",
        **({"rescale_betas_zero_snr": True} if "ztsnr" in shapes else {}),
    }


def _tokenizer(pad: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "bos_token": "<|startoftext|>",
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": pad,
    }


def _index(family: FamilyName, texts: dict[str, dict[str, Any]], scheduler: dict[str, Any]) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": _PIPELINES[family],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    for name, config in texts.items():
        index[name] = ["transformers", config["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if family == "SDXL":
        return index | {"force_zeros_for_empty_prompt": True}
    return index | {"feature_extractor": [None, None], "safety_checker": [None, None]}


def _is_open_clip(prefix: str) -> bool:
    return prefix.endswith(".model.")


def _first(prefix: str) -> str:
    return _OPEN_CLIP if _is_open_clip(prefix) else _CLIP


def _heads(width: int) -> int:
    if width % _HEAD_WIDTH:
        raise ValueError(f"it is {width} wide somewhere, and the heads of a published model are {_HEAD_WIDTH}")
    return width // _HEAD_WIDTH


def _count(shapes: Shapes, prefix: str) -> int:
    """Return how many numbered parts there are below a prefix. Raises ValueError when one in between is missing."""
    parts = {name.removeprefix(prefix).split(".", 1)[0] for name in shapes if name.startswith(prefix)}
    found = {int(part) for part in parts if part.isdecimal()}
    if found != set(range(len(found))):
        raise ValueError(f"of its {prefix}* some are missing")
    return len(found)
