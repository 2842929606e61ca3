"""`spec.model`: the base model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffusion_api.meta import ApiModel, Uri

Family = Literal["SD1", "SD2", "SDXL", "SD3", "UNet2D"]


class TextEncoder(ApiModel):
    """Where the text encoders come from, and whether they learn too."""

    source: Uri | None = None
    """Text encoders and tokenizers that the model lacks, or others than its own: a folder in diffusers layout, of which
    the folders text_encoder* and tokenizer* are used. Single files without text encoders need it;
    of SD3 all do, at least for T5's tokenizer."""
    train: bool = False
    """Train the text encoders with the denoiser. Needs more memory and rarely helps. Of SD3's the two of CLIP learn;
    T5 stays as it is."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-6
    """Learning rate of the text encoders."""


class Model(ApiModel):
    """The base model, in diffusers layout or as one safetensors file."""

    source: Uri
    """Folder in diffusers layout (with model_index.json), or a single .safetensors file of SD1, SD2, SDXL or SD3."""
    revision: Annotated[str, Field(max_length=128)] | None = None
    """Commit of an hf:// source. Pin it: a branch may move between two attempts."""
    family: Literal["Auto", "SD1", "SD2", "SDXL", "SD3", "UNet2D"] = "Auto"
    """Architecture; Auto reads it from the model's own configuration."""
    vae: Uri | None = None
    """Another VAE than the model's own: its folder in diffusers layout, or that of a model that has it. It is exported
    with a model that is trained as a whole."""
    text_encoder: TextEncoder = Field(default_factory=TextEncoder)
    """Source and training of the text encoders."""
