"""A Stable Diffusion 1 and image folders, small enough for tests, of the real classes and in the real layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Shape = tuple[int, int]

_TEXT_WIDTH = 32
_START, _END = "<|startoftext|>", "<|endoftext|>"

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": _TEXT_WIDTH,
}
VAE: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


LARGE_PICTURES: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}
"""Changes to UNET that keep pictures of 512 pixels quick on a CPU: attention from 16 x 16 latents on."""


def make_tiny_sd1(folder: Path, *, seed: int = 0, unet: Mapping[str, Any] | None = None) -> Path:
    """Write a Stable Diffusion 1 in diffusers layout, the same bytes for the same arguments, and return the folder.

    `unet` changes the denoiser's configuration.
    """
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    text = text_config(_TEXT_WIDTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        UNet2DConditionModel(**UNET | dict(unet or {})).save_pretrained(folder / "unet", safe_serialization=True)
        AutoencoderKL(**VAE).save_pretrained(folder / "vae", safe_serialization=True)
        CLIPTextModel(text).save_pretrained(folder / "text_encoder", safe_serialization=True)
    PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def make_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write a CLIP model with both towers in transformers' layout and return the folder; it looks at 24 x 24 pixels."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    width, side = 16, 24
    vision = {
        "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": side, "patch_size": 8, "projection_dim": width,
    }  # fmt: skip
    text = text_config(width).to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    write_tokenizer(folder)
    model.save_pretrained(folder, safe_serialization=True)
    eye = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    eye.save_pretrained(folder)
    return folder


def text_config(width: int, **changes: Any) -> Any:
    """Return the configuration of a CLIP text encoder with the vocabulary of `write_tokenizer`."""
    from transformers import CLIPTextConfig

    end = len(vocabulary()) - 1
    fields = {
        "vocab_size": len(vocabulary()),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "projection_dim": width,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return CLIPTextConfig(**fields | changes)


def vocabulary() -> dict[str, int]:
    """Return the byte-level vocabulary of CLIP without its merges: every byte, inside and at the end of a word."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), _START, _END]
    return {word: number for number, word in enumerate(words)}


def write_tokenizer(folder: Path, *, pad: str = _END) -> None:
    """Write the files of a byte-level tokenizer; OpenCLIP's pads with "!"."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": _START, "eos_token": _END, "pad_token": pad, "unk_token": _END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_image_folder(
    folder: Path,
    count: int = 8,
    *,
    captions: Literal["Sidecar", "ImageFolder", "None"] = "Sidecar",
    sizes: Sequence[Shape] = ((64, 64),),
    seed: int = 0,
) -> Path:
    """Write `count` pictures of coloured rectangles, each different, with captions, and return the folder.

    Sizes are (width, height) and are used in turn. Names are 000.png, 001.jpg, 002.webp, 003.png, ...
    """
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        pixels[:] = numbers.integers(0, 256, 3)
        pixels[: height // 2, : width // 3] = numbers.integers(0, 256, 3)
        name = f"{i:03d}.{('png', 'jpg', 'webp')[i % 3]}"
        Image.fromarray(pixels).save(folder / name)
        caption = f"picture {i} of a thing"
        rows.append({"file_name": name, "text": caption})
        if captions == "Sidecar":
            (folder / f"{i:03d}.txt").write_text(caption + "\n")
    if captions == "ImageFolder":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
