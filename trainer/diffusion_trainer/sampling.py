"""Sample pictures while training: the same prompts from the same noise, with the weights as they are in memory."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from diffusion_api.validation import SamplePrompt
from diffusion_trainer.data.lock import Shape
from diffusion_trainer.models.base import Family, NoiseSchedule
from diffusion_trainer.rng import Purpose, stream

SAMPLER = "DDIM"
_LATENT_CHANNELS = 4
_LABEL_HEIGHT = 18
_GAP = 4
_PREDICTIONS = {"Epsilon": "epsilon", "VPrediction": "v_prediction", "Sample": "sample"}


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


def sample_grid(family: Family, prompts: Sequence[SamplePrompt], *, size: Shape) -> SampleGrid:
    """Draw one picture for each prompt, of which there must be one; `size` is (width, height) in pixels.

    DDIM with classifier-free guidance. The noise is a function of the prompt's seed alone, so pictures of different
    steps can be compared. The denoiser is left in the mode (train or eval) it was in, and the encoders on the CPU.
    """
    if not prompts:
        raise ValueError("sample_grid: there is no prompt")
    with _evaluating(family):
        texts = family.encode_text([text for prompt in prompts for text in (prompt.negative_prompt, prompt.prompt)])
        family.release_encoders()
        shape = (_LATENT_CHANNELS, size[1] // family.latent_scale, size[0] // family.latent_scale)
        latents = [
            _denoised(family, prompt, texts[2 * i : 2 * i + 2], _noise(prompt.seed, shape))
            for i, prompt in enumerate(prompts)
        ]
        pictures = tuple(Image.fromarray(family.decode(one)[0].numpy()) for one in latents)
        family.release_encoders()
    return SampleGrid(pictures, tuple(_parameters(prompt, size) for prompt in prompts))


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


def _denoised(family: Family, prompt: SamplePrompt, text: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return [1, 4, h, w] from noise; `text` is [2, 77, D]: negative prompt, prompt."""
    scheduler = _scheduler(family.noise_schedule())
    scheduler.set_timesteps(prompt.steps)
    guided = prompt.guidance_scale != 1
    text = (text if guided else text[1:]).to(family.device)
    latents = latents.to(family.device)
    for timestep in scheduler.timesteps:  # on the CPU: nothing here waits for the GPU
        prediction = _predicted(family, latents.expand(len(text), -1, -1, -1), int(timestep), text)
        if guided:
            without, along = prediction.chunk(2)
            prediction = without + prompt.guidance_scale * (along - without)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def _predicted(family: Family, latents: torch.Tensor, timestep: int, text: torch.Tensor) -> torch.Tensor:
    times = torch.full((len(text),), timestep, device=family.device)
    mixed = family.dtype != torch.float32
    with torch.autocast(family.device.type, dtype=family.dtype if mixed else torch.bfloat16, enabled=mixed):
        prediction: torch.Tensor = family.denoiser(latents, times, text).sample
    return prediction.float()


def _scheduler(schedule: NoiseSchedule) -> Any:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=len(schedule.alphas_cumprod),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=_PREDICTIONS[schedule.prediction_type],
        # With no signal at all at the last timestep, sampling has to begin exactly there (arXiv 2305.08891).
        timestep_spacing="trailing" if schedule.alphas_cumprod[-1] == 0 else "leading",
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = schedule.alphas_cumprod[0]
    return scheduler


def _parameters(prompt: SamplePrompt, size: Shape) -> str:
    """Return AUTOMATIC1111's `parameters` text: prompt, negative prompt if there is one, settings."""
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    lines.append(
        f"Steps: {prompt.steps}, Sampler: {SAMPLER}, CFG scale: {prompt.guidance_scale:g}, Seed: {prompt.seed}, "
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
