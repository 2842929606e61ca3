"""Sample pictures while training: the same prompts from the same noise, with the weights as they are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_api.validation import SamplePrompt
from PIL import Image

from diffusion_trainer.data.lock import Shape
from diffusion_trainer.models.base import Family


@dataclass(frozen=True, slots=True)
class SampleGrid:
    """Pictures of one evaluation, each with the text that AUTOMATIC1111 would write into it."""

    pictures: tuple[Image.Image, ...]
    parameters: tuple[str, ...]

    def grid_png(self) -> bytes:
        """Return one PNG with all pictures, each above its prompt."""
        raise NotImplementedError

    def picture_png(self, index: int) -> bytes:
        """Return one picture as PNG with a `parameters` text chunk."""
        raise NotImplementedError


def sample_grid(family: Family, prompts: Sequence[SamplePrompt], *, size: Shape) -> SampleGrid:
    """Draw one picture for each prompt; `size` is (width, height) in pixels.

    DDIM with classifier-free guidance. The noise is a function of the prompt's seed alone, so pictures of different
    steps can be compared. The denoiser is left in the mode (train or eval) it was in.
    """
    raise NotImplementedError
