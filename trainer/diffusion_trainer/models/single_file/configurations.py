"""From the shapes of a single file's tensors to the configurations of its components, as they are published.

Shapes do not say everything: numbers of heads and groups, factors and noise schedules are those of the published models
(CompVis/stable-diffusion, Stability-AI/stablediffusion and generative-models, configs/; the same in the folders at
huggingface.co that diffusers made from them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.errors import BadData
from diffusion_trainer.models.single_file import mmdit
from diffusion_trainer.models.single_file.header import Shapes, count
from diffusion_trainer.models.single_file.published import (
    DENOISER,
    GEOMETRY_WIDTH,
    PIPELINES,
    SCHEDULERS,
    TEXTS,
    VAE,
    VAES,
    WORDS,
    denoiser_folder,
    heads,
    is_open_clip,
)

_CLIP, _OPEN_CLIP = "text_model.embeddings.token_embedding.weight", "token_embedding.weight"
_SD1_HEADS = 8
_OTHER_TEXTS = ("cond_stage_model.", "conditioner.")
_SCALES = (".scale_weight", "scaled_fp8")
_SD2_PUBLISHED_LAYERS = 24
_END, _OPEN_CLIP_PAD = "<|endoftext|>", "!"


def family_of(shapes: Shapes, *, where: str) -> FamilyName:
    """Return the family of a single file, by its text encoders or, where it has none, by its denoiser.

    Raises `BadData` for one of none.
    """
    if any(name.startswith(f"{DENOISER}joint_blocks.") for name in shapes):
        return "SD3"
    if f"{DENOISER}input_blocks.0.0.weight" not in shapes:
        raise BadData(
            f"model.source {where} is no whole model by the original names (it has neither "
            f"{DENOISER}input_blocks.0.0.weight nor {DENOISER}joint_blocks.*): adapters, and files "
            "of a denoiser alone, are none; use a checkpoint of SD1, SD2, SDXL or SD3, or a folder in diffusers layout"
        )
    families: tuple[FamilyName, ...] = ("SDXL", "SD2", "SD1")
    for family in families:
        if all(prefix + _first(prefix) in shapes for prefix in TEXTS[family].values()):
            return family
    if any(name.startswith(_OTHER_TEXTS) for name in shapes):
        raise BadData(
            f"model.source {where} holds a UNet with other text encoders than those of SD1, SD2 or SDXL base; use the "
            "checkpoint of one of them, or a folder in diffusers layout"
        )
    if f"{DENOISER}label_emb.0.0.weight" in shapes:
        return "SDXL"
    return "SD2" if _is_linear(shapes) else "SD1"


def weights(shapes: Shapes, family: FamilyName, supplied: Collection[str] = ()) -> dict[str, str]:
    """Return the components whose weights are read, and where in the file they are.

    Of the text encoders those that the file holds; of all, those that do not come from elsewhere (`supplied`).
    """
    texts = {name: prefix for name, prefix in TEXTS[family].items() if _holds(shapes, prefix)}
    places = {denoiser_folder(family): DENOISER, "vae": VAE, **texts}
    return {name: prefix for name, prefix in places.items() if name not in supplied}


def configurations(shapes: Shapes, *, where: str, supplied: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the JSON files of the folder in diffusers layout, by their paths, the tokenizers' vocabularies apart.

    `supplied` are components (folders) that come from elsewhere and are left out. Raises `BadData` for a file that is
    no model of a family, or lacks parts of one.
    """
    family = family_of(shapes, where=where)
    read = tuple(weights(shapes, family, supplied).values())
    scaled = next((name for name in shapes if name.startswith(read) and name.endswith(_SCALES)), None)
    if scaled:
        raise BadData(
            f"model.source {where} has 8-bit weights with scales of their own ({scaled}), made for inference; use the "
            "checkpoint in 16 bits"
        )
    try:
        found = dict(_components(shapes, family, supplied))
    except KeyError as error:
        remedy = ", or give model.vae" if str(error.args[0]).startswith(VAE) else ""
        raise BadData(
            f"model.source {where} looks like {family} and has no {error.args[0]}; use the whole checkpoint{remedy}"
        ) from error
    except (ValueError, IndexError) as error:
        raise BadData(
            f"model.source {where} looks like {family}, but {error}; use a folder in diffusers layout"
        ) from error
    return found | {"model_index.json": _index(family)}


def _components(shapes: Shapes, family: FamilyName, supplied: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    denoiser = denoiser_folder(family)
    yield f"{denoiser}/config.json", mmdit.transformer(shapes) if family == "SD3" else _unet(shapes, family)
    yield "scheduler/scheduler_config.json", _scheduler(shapes, family)
    for name, prefix in weights(shapes, family, supplied).items():
        if name == "vae":
            yield "vae/config.json", _vae(shapes, family)
        elif name == "text_encoder_3":
            yield f"{name}/config.json", mmdit.t5(shapes, prefix)
        elif name in TEXTS[family]:
            yield f"{name}/config.json", _clip(shapes, prefix, family)
    for name, prefix in TEXTS[family].items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        if tokenizer not in supplied and name != "text_encoder_3":  # T5's vocabulary is nowhere at hand
            yield f"{tokenizer}/tokenizer_config.json", _tokenizer(_OPEN_CLIP_PAD if _is_open(prefix) else _END)


def _unet(shapes: Shapes, family: FamilyName) -> dict[str, Any]:
    blocks = list(_blocks(shapes))
    channels = [width for width, _, _ in blocks]
    layers = {held for _, held, _ in blocks}
    if len(layers) != 1:
        raise ValueError(f"its UNet has blocks of {sorted(layers)} layers, where those of a published one are alike")
    depths = [depth for _, _, depth in blocks]
    middle = count(shapes, f"{DENOISER}middle_block.1.transformer_blocks.")
    attention = next((name for name in shapes if name.startswith(DENOISER) and name.endswith(".attn2.to_k.weight")), "")
    if not attention or not middle:
        raise KeyError(f"{DENOISER}middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128 if family == "SDXL" else 64,
        "in_channels": shapes[f"{DENOISER}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{DENOISER}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers.pop(),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [depths[-1] or middle],
        "cross_attention_dim": shapes[attention][1],
        # Of that name, but diffusers takes it for the number of heads.
        "attention_head_dim": _SD1_HEADS if family == "SD1" else [heads(width) for width in channels],
        "use_linear_projection": _is_linear(shapes),
    }
    if family == "SDXL":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": GEOMETRY_WIDTH,
            "projection_class_embeddings_input_dim": shapes[f"{DENOISER}label_emb.0.0.weight"][1],
        }
    return config


def _is_linear(shapes: Shapes) -> bool:
    return len(shapes[f"{DENOISER}middle_block.1.proj_in.weight"]) == 2


def _blocks(shapes: Shapes) -> Iterator[tuple[int, int, int]]:
    """Yield the channels, the layers and the depth of the transformers (0 without) of each block on the way down."""
    place, width, layers, depth = 1, 0, 0, 0
    while True:
        prefix = f"{DENOISER}input_blocks.{place}."
        resnet = shapes.get(f"{prefix}0.in_layers.2.weight")
        if resnet is None:
            if not layers:
                raise KeyError(f"{prefix}0.in_layers.2.weight")
            yield width, layers, depth
            if f"{prefix}0.op.weight" not in shapes:
                return
            width, layers, depth = 0, 0, 0
        else:
            width, layers = resnet[0], layers + 1
            depth = max(depth, count(shapes, f"{prefix}1.transformer_blocks."))
        place += 1


def _vae(shapes: Shapes, family: FamilyName) -> dict[str, Any]:
    depth = count(shapes, f"{VAE}encoder.down.")
    if not depth:
        raise KeyError(f"{VAE}encoder.down.0.block.0.conv1.weight")
    quantized = f"{VAE}post_quant_conv.weight" in shapes
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(depth)],
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "layers_per_block": count(shapes, f"{VAE}encoder.down.0.block."),
        "latent_channels": shapes[f"{VAE}decoder.conv_in.weight"][1],
        "use_quant_conv": quantized,
        "use_post_quant_conv": quantized,
        **VAES[family],
    }


def _clip(shapes: Shapes, prefix: str, family: FamilyName) -> dict[str, Any]:
    named = is_open_clip(prefix)
    words, width = shapes[prefix + _first(prefix)]
    if words != WORDS:
        raise ValueError(f"its text encoder {prefix} has {words} words, where CLIP has {WORDS}")
    layers = f"{prefix}transformer.resblocks." if named else f"{prefix}text_model.encoder.layers."
    inner = f"{layers}0.mlp.c_fc.weight" if named else f"{layers}0.mlp.fc1.weight"
    places = f"{prefix}positional_embedding" if named else f"{prefix}text_model.embeddings.position_embedding.weight"
    held = count(shapes, layers)
    projected = family == "SD3" or (family == "SDXL" and named)
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shapes[inner][0],
        # The last layer of SD2's is in the file, and never used.
        "num_hidden_layers": held - 1 if family == "SD2" and held == _SD2_PUBLISHED_LAYERS else held,
        "num_attention_heads": heads(width),
        "max_position_embeddings": shapes[places][0],
        "projection_dim": _projection(shapes, prefix, width) if projected else width,
        "hidden_act": "gelu" if _is_open(prefix) else "quick_gelu",
        "bos_token_id": WORDS - 2,
        "eos_token_id": WORDS - 1,
        "pad_token_id": 1,
    }


def _projection(shapes: Shapes, prefix: str, width: int) -> int:
    """Return the width of the pooled text; that of SD3's CLIP-L is not projected (see `weights`)."""
    if is_open_clip(prefix):
        return shapes[f"{prefix}text_projection"][1]
    return shapes[f"{prefix}text_projection.weight"][0] if _is_open(prefix) else width


def _scheduler(shapes: Shapes, family: FamilyName) -> dict[str, Any]:
    """Return the published schedule; a file with a tensor `v_pred` (and `ztsnr`) says that it was trained over."""
    return SCHEDULERS[family] | {
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


def _index(family: FamilyName) -> dict[str, Any]:
    denoiser = "SD3Transformer2DModel" if family == "SD3" else "UNet2DConditionModel"
    index: dict[str, Any] = {
        "_class_name": PIPELINES[family],
        denoiser_folder(family): ["diffusers", denoiser],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", SCHEDULERS[family]["_class_name"]],
    }
    for name in TEXTS[family]:
        projected = family == "SD3" or name == "text_encoder_2"
        clip = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        kinds = ("T5EncoderModel", "T5TokenizerFast") if name == "text_encoder_3" else (clip, "CLIPTokenizer")
        index[name] = ["transformers", kinds[0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", kinds[1]]
    if family == "SDXL":
        return index | {"force_zeros_for_empty_prompt": True}
    return index if family == "SD3" else index | {"feature_extractor": [None, None], "safety_checker": [None, None]}


def _holds(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _is_open(prefix: str) -> bool:
    """Return whether a CLIP is one of OpenCLIP's, by whatever names."""
    return is_open_clip(prefix) or prefix == TEXTS["SD3"]["text_encoder_2"]


def _first(prefix: str) -> str:
    return _OPEN_CLIP if is_open_clip(prefix) else _CLIP
