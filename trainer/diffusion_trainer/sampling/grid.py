"""A picture for each prompt, and all of them in one file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from diffusion_api.validation import SamplePrompt
from diffusion_trainer.data.lock import Shape
from diffusion_trainer.data.transforms import Geometry
from diffusion_trainer.methods import TextPath
from diffusion_trainer.models.base import Conditioning, Family
from diffusion_trainer.objective import Process
from diffusion_trainer.rng import Purpose, stream
from diffusion_trainer.sampling.samplers import denoised, sampler_name

_LABEL_HEIGHT = 18
_GAP = 4
_ALL = slice(None)

Drawn: TypeAlias = tuple[int, str]
"""A picture on its way to another process, in JSON's types: the number of its prompt, and RGB bytes in base64."""


@dataclass(frozen=True, slots=True)
class SampleGrid:
    """Pictures of one evaluation, all of one size, each with the text that AUTOMATIC1111 would write into it."""

    pictures: tuple[Image.Image, ...]
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, pictures: Sequence[Image.Image], prompts: Sequence[SamplePrompt], *, process: Process) -> SampleGrid:
        """Return the pictures with what they were drawn from, in the same order."""
        sampler = sampler_name(process)
        texts = [_parameters(prompt, one.size, sampler) for one, prompt in zip(pictures, prompts, strict=True)]
        return cls(tuple(pictures), tuple(texts))

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
    family: Family,
    prompts: Sequence[SamplePrompt],
    *,
    size: Shape,
    text: TextPath | None = None,
    part: slice = _ALL,
    gather: Callable[[list[Drawn]], list[Drawn]] = lambda drawn: drawn,
) -> SampleGrid | None:
    """Draw one picture for each prompt, of which there must be one; `size` is (width, height) in pixels.

    The noise is a function of the prompt's seed alone, so pictures of different steps can be compared. The denoiser is
    left in the mode (train or eval) it was in, and the encoders on the CPU. `text` is the way of prompts to the
    denoiser; by default, through the frozen encoders.

    Of several processes each draws a `part` of the prompts, and `gather` brings the pictures of all to the one that
    gets the grid; others get None. Prompts are encoded and drawn one by one, so that the grid is the same bytes
    whoever draws what.
    """
    if not prompts:
        raise ValueError("sample_grid: there is no prompt")
    numbers = range(len(prompts))[part]
    mine = [prompts[number] for number in numbers]
    pictures = draw(family, wanted(mine, encoded(family, mine, text=text)), size=size)
    drawn = gather([(number, _packed(picture)) for number, picture in zip(numbers, pictures, strict=True)])
    if not drawn:
        return None
    return SampleGrid.of([_unpacked(packed, size) for _, packed in sorted(drawn)], prompts, process=family.process)


def encoded(family: Family, prompts: Sequence[SamplePrompt], *, text: TextPath | None = None) -> list[Conditioning]:
    """Return the conditioning [2, ...] of each prompt: of what to keep away from, and of what to draw."""
    if not prompts:
        return []
    path = text or TextPath(family)
    with _evaluating(family):
        found = [path.encode([prompt.negative_prompt, prompt.prompt]) for prompt in prompts]
        family.release_encoders()
    return found


def wanted(prompts: Sequence[SamplePrompt], conditionings: Sequence[Conditioning]) -> list[Wanted]:
    """Return the picture that each prompt asks for."""
    return [
        Wanted(conditioning, seed=prompt.seed, steps=prompt.steps, guidance=prompt.guidance_scale)
        for prompt, conditioning in zip(prompts, conditionings, strict=True)
    ]


def draw(
    family: Family, wanted: Sequence[Wanted], *, size: Shape, process: Process | None = None
) -> tuple[Image.Image, ...]:
    """Draw pictures of one size, (width, height); the denoiser's mode and the encoders as in `sample_grid`.

    `process` is the one that the weights were trained on: by default, the one that they are being trained on.
    """
    shape = (family.latent_channels, size[1] // family.latent_scale, size[0] // family.latent_scale)
    with _evaluating(family):
        latents = [
            denoised(
                family,
                _noise(one.seed, shape),
                one.conditioning,
                process=process or family.process,
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


def _packed(picture: Image.Image) -> str:
    return base64.b64encode(picture.tobytes()).decode()


def _unpacked(packed: str, size: Shape) -> Image.Image:
    return Image.frombytes("RGB", size, base64.b64decode(packed))


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
