"""What the shapes in a single file do not say: where its parts are, and the numbers of the published models."""

from __future__ import annotations

from typing import Any

from diffusion_api.model import Family as FamilyName

DENOISER, VAE = "model.diffusion_model.", "first_stage_model."
TEXTS: dict[FamilyName, dict[str, str]] = {
    "SD1": {"text_encoder": "cond_stage_model.transformer."},
    "SD2": {"text_encoder": "cond_stage_model.model."},
    "SDXL": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "SD3": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
}
"""Where the text encoders of each family are; below `.model.` by OpenCLIP's names. Files may lack them."""
WORDS = 49408
"""Of CLIP's vocabulary."""
_HEAD_WIDTH = 64
GEOMETRY_WIDTH = 256
"""Of the embedding of each of the six numbers by which SDXL is told a crop."""
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
SCHEDULERS: dict[FamilyName, dict[str, Any]] = {
    "SD1": {"_class_name": "PNDMScheduler", **_NOISE, "skip_prk_steps": True, "set_alpha_to_one": False},
    "SD2": {"_class_name": "DDIMScheduler", **_NOISE, "set_alpha_to_one": False},
    "SDXL": {"_class_name": "EulerDiscreteScheduler", **_NOISE, "timestep_spacing": "leading"},
    "SD3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}
PIPELINES: dict[FamilyName, str] = {
    "SD1": "StableDiffusionPipeline",
    "SD2": "StableDiffusionPipeline",
    "SDXL": "StableDiffusionXLPipeline",
    "SD3": "StableDiffusion3Pipeline",
}
_VAE_OF_4: dict[str, Any] = {"sample_size": 512, "scaling_factor": 0.18215, "force_upcast": False}
VAES: dict[FamilyName, dict[str, Any]] = {
    "SD1": _VAE_OF_4,
    "SD2": _VAE_OF_4,
    "SDXL": {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "SD3": {"sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True},
}


def denoiser_folder(family: FamilyName) -> str:
    """Return the denoiser's folder in diffusers layout."""
    return "transformer" if family == "SD3" else "unet"


def heads(width: int) -> int:
    """Return the number of attention heads of a published network. Raises ValueError for a width that none has."""
    if width % _HEAD_WIDTH:
        raise ValueError(f"it is {width} wide somewhere, and the heads of a published model are {_HEAD_WIDTH}")
    return width // _HEAD_WIDTH


def is_open_clip(prefix: str) -> bool:
    """Return whether the weights of a text encoder have OpenCLIP's names."""
    return prefix.endswith(".model.")
