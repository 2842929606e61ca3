"""A picture for each prompt, and all of them in one file."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from diffusion_api.validation import SamplePrompt
from diffusion_trainer.data.lock import Shape
from diffusion_trainer.data.transforms import Geometry
from diffusion_trainer.methods import TextPath
from diffusion_trainer.models.base import Conditioning, Family
from diffusion_trainer.rng import Purpose, stream
from diffusion_trainer.sampling.samplers import denoised, sampler_name

_LABEL_HEIGHT = 18
_GAP = 4


@dataclass(frozen=True, slots=True)
class SampleGrid:
    """Pictures of one evaluation, all of one size, each with the text that AUTOMATIC1111 would write into it."""

    pictures: tuple[Image.Image, ...]
    parameters: tuple[str, ...]

    def grid_png(self) -> bytes:
        """Return one PNG with all pictures, each above its prompt, and all parameters in one text chunk."""
        columns = math.ceil(math.sqrt(len(self.pictures)))
        rows = -(-len(self.pictures) // columns)
        width, height = self.pictures[0].size
        pitch = (width + _GAP, height + _LABEL_HEIGHT + _GAP)
        grid = Image.new("RGB", (columns * pitch[0] + _GAP, rows * pitch[1] + _GAP), (255, 255, 255))
        for i, (picture, text) in enumerate(zip(self.pictures, self.parameters, strict=True)):
            corner = (_GAP + i % columns * pitch[0], _GAP + i // columns * pitch[1])
            grid.paste(picture, corner)
            grid.paste(_label(text.partition("\n")[0], width), (corner[0], corner[1] + height))
        return _png(grid, "\n\n".join(self.parameters))

    def picture_png(self, index: int) -> bytes:
        """Return one picture as PNG with a `parameters` text chunk."""
        return _png(self.pictures[index], self.parameters[index])


@dataclass(frozen=True, slots=True)
class Wanted:
    """One picture: the conditioning [2, ...] of what to keep away from and of what to draw, and how to draw it."""

    conditioning: Conditioning
    seed: int
    steps: int
    guidance: float


def sample_grid(
    family: Family, prompts: Sequence[SamplePrompt], *, size: Shape, text: TextPath | None = None
) -> SampleGrid:
    """Draw one picture for each prompt, of which there must be one; `size` is (width, height) in pixels.

    The noise is a function of the prompt's seed alone, so pictures of different
    steps can be compared. The denoiser is left in the mode (train or eval) it was in, and the encoders on the CPU.
    `text` is the way of prompts to the denoiser; by default, through the frozen encoders.
    """
    if not prompts:
        raise ValueError("sample_grid: there is no prompt")
    with _evaluating(family):
        texts = (text or TextPath(family)).encode([said for p in prompts for said in (p.negative_prompt, p.prompt)])
        family.release_encoders()
    wanted = [
        Wanted(
            {name: rows[2 * i : 2 * i + 2] for name, rows in texts.items()},
            seed=prompt.seed,
            steps=prompt.steps,
            guidance=prompt.guidance_scale,
        )
        for i, prompt in enumerate(prompts)
    ]
    pictures = draw(family, wanted, size=size)
    return SampleGrid(pictures, tuple(_parameters(prompt, size, sampler_name(family.process)) for prompt in prompts))


def draw(family: Family, wanted: Sequence[Wanted], *, size: Shape) -> tuple[Image.Image, ...]:
    """Draw pictures of one size, (width, height); the denoiser's mode and the encoders as in `sample_grid`."""
    shape = (family.latent_channels, size[1] // family.latent_scale, size[0] // family.latent_scale)
    with _evaluating(family):
        latents = [
            denoised(
                family,
                _noise(one.seed, shape),
                one.conditioning,
                geometry=Geometry(original=size, crop=(0, 0), target=size).numbers(),
                steps=one.steps,
                guidance=one.guidance,
            )
            for one in wanted
        ]
        pictures = tuple(Image.fromarray(family.decode(one)[0].numpy()) for one in latents)
        family.release_encoders()
    return pictures


@contextmanager
def _evaluating(family: Family) -> Iterator[None]:
    was_training = family.denoiser.training
    family.denoiser.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        family.denoiser.train(was_training)


def _noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    numbers = stream(seed, Purpose.SAMPLE).standard_normal((1, *shape), dtype=np.float32)
    return torch.from_numpy(numbers)


def _parameters(prompt: SamplePrompt, size: Shape, sampler: str) -> str:
    """Return AUTOMATIC1111's `parameters` text: prompt, negative prompt if there is one, settings."""
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    lines.append(
        f"Steps: {prompt.steps}, Sampler: {sampler}, CFG scale: {prompt.guidance_scale:g}, Seed: {prompt.seed}, "
        f"Size: {size[0]}x{size[1]}"
    )
    return "\n".join(lines)


def _label(text: str, width: int) -> Image.Image:
    label = Image.new("RGB", (width, _LABEL_HEIGHT), (255, 255, 255))
    # The font that comes with Pillow has Latin letters only; the text chunk has the prompt as it is.
    shown = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(label).text((2, 2), shown, fill=(0, 0, 0), font=ImageFont.load_default())
    return label


def _png(image: Image.Image, parameters: str) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", parameters)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()
