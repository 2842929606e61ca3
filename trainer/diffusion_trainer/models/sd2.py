"""Stable Diffusion 2.x: SD1's networks with OpenCLIP's text encoder.

The text encoder is published cut to 23 layers, so its last hidden state is what the paper calls the penultimate one.
The models of 512 px predict the noise, those of 768 px v; which one it is says the noise scheduler's configuration.
"""

from __future__ import annotations

from diffusion_api.model import Family as FamilyName
from diffusion_trainer.models.sd1 import StableDiffusion1


class StableDiffusion2(StableDiffusion1):
    """The family SD2; see `models.base.Family`. Conditioning: `text` [77, D]."""

    name: FamilyName = "SD2"
