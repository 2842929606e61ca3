"""Pictures of the captions of held-out images, with the weights as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from diffusion_api.validation import SamplePrompt
from diffusion_trainer.cache import Cache
from diffusion_trainer.data import LockedImage
from diffusion_trainer.data.loader import stacked
from diffusion_trainer.methods import TextPath
from diffusion_trainer.models import Family
from diffusion_trainer.rng import Purpose, stream
from diffusion_trainer.sampling import Wanted, draw

_USUAL = SamplePrompt(prompt="")
"""As a sample prompt has it by default, so is it drawn: steps and guidance."""
_SEEDS = 2**53


def pictures_of(
    images: Sequence[LockedImage], family: Family, cache: Cache, *, text: TextPath, seed: int
) -> tuple[Image.Image, ...]:
    """Draw a picture of the caption of each image, all of one shape.

    The noise is a function of (seed, image id). Captions are not encoded again: the cache has them, and the empty one.
    """
    with torch.no_grad():
        wanted = [
            Wanted(
                text.conditioning(stacked([cache.text(""), cache.text(image.caption)])),
                seed=int(stream(seed, Purpose.SCORE, image.id).integers(_SEEDS)),
                steps=_USUAL.steps,
                guidance=_USUAL.guidance_scale,
            )
            for image in images
        ]
    return draw(family, wanted, size=images[0].bucket)
