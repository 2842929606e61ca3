"""From noise to latents: DDIM for noise schedules, Euler for flows, both with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_trainer.models.base import Conditioning, Family
from diffusion_trainer.objective import DiscreteProcess, FlowProcess, Process

_LEFT_OUT = 0.1
"""Of the schedule, that leading spacing may leave out at its noisy end by dividing integers."""


def sampler_name(process: Process) -> str:
    """Return the name of the sampler that is used, as user interfaces write it."""
    return "Euler" if isinstance(process, FlowProcess) else "DDIM"


def denoised(  # noqa: PLR0913 - what a picture is made of
    family: Family,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    process: Process,
    geometry: Tensor,
    steps: int,
    guidance: float,
) -> Tensor:
    """Return latents [1, C, h, w] from noise of that shape.

    conditioning: [2, ...], of the negative prompt and the prompt, empty for a family without text; geometry: [6].
    `process`: the one that the denoiser was trained on.
    """
    way = _way(process, steps, in_pixels=family.latent_scale == 1)
    guided = guidance != 1 and bool(conditioning)
    rows = {name: (both if guided else both[1:]).to(family.device) for name, both in conditioning.items()}
    places = geometry.expand(2 if guided else 1, -1).to(family.device)
    latents = noise.to(family.device)
    for index, time in enumerate(way.times):  # on the CPU: nothing here waits for the GPU
        prediction = _predicted(family, latents.expand(len(places), -1, -1, -1), time, rows, places)
        if guided:
            without, along = prediction.chunk(2)
            prediction = without + guidance * (along - without)
        latents = way.step(index, prediction, latents)
    return latents


class _Way(Protocol):
    """From noise to latents: `times` of the family's process, and what follows from a prediction at one of them."""

    @property
    def times(self) -> Tensor: ...

    def step(self, index: int, prediction: Tensor, latents: Tensor) -> Tensor: ...


def _way(process: Process, steps: int, *, in_pixels: bool) -> _Way:
    if isinstance(process, FlowProcess):
        return _Euler(process, steps)
    return Ddim(process, steps, in_pixels=in_pixels)


def _predicted(family: Family, latents: Tensor, time: Tensor, rows: Conditioning, geometry: Tensor) -> Tensor:
    times = torch.full((len(latents),), time.item(), dtype=time.dtype, device=family.device)
    mixed = family.dtype != torch.float32
    with torch.autocast(family.device.type, dtype=family.dtype if mixed else torch.bfloat16, enabled=mixed):
        prediction = family.predict(latents, times, rows, geometry)
    return prediction.float()


def ddim_timesteps(process: DiscreteProcess, steps: int, *, in_pixels: bool) -> Sequence[int]:
    """Return the timesteps of so many steps, the noisiest first: the leading or trailing spacing of diffusers.

    Leading is what Stable Diffusion is drawn with, from timestep 1 (0 in pixels) on in equal intervals. Their length is
    an integer, so the remainder of the division is left out where sampling begins from pure noise: next to nothing for
    30 steps, but half of the schedule for 501; and 1000 steps from 1 on end beyond it. There, and where the process
    ends without any signal or its model asks for it, spacing is trailing (arXiv 2305.08891, section 3.3).
    """
    total, offset = len(process.alphas_cumprod), 0 if in_pixels else 1
    interval, remainder = divmod(total, steps)
    first = (steps - 1) * interval + offset
    asked = process.config.get("timestep_spacing") == "trailing" or process.alphas_cumprod[-1] == 0
    if asked or remainder > _LEFT_OUT * total or first >= total:
        return [round((steps - done) * total / steps) - 1 for done in range(steps)]
    return range(first, offset - 1, -interval)


class Ddim:
    """DDIM without noise of its own (Song et al. 2021, arXiv 2010.02502, equation 12).

    Each step goes to the timestep at which the next begins. (diffusers goes a rounded interval down instead, which is
    not that where timesteps are spaced unevenly.) `in_pixels`: values are known to be in [-1, 1], and the last step
    goes to the image itself; in latents it goes to timestep 0.
    """

    def __init__(self, process: DiscreteProcess, steps: int, *, in_pixels: bool) -> None:
        """Plan so many steps, at most one for each timestep of the process."""
        timesteps = ddim_timesteps(process, steps, in_pixels=in_pixels)
        alphas: list[float] = process.alphas_cumprod.tolist()
        self.times = torch.tensor(timesteps)
        self._alphas = [alphas[timestep] for timestep in timesteps] + [1.0 if in_pixels else alphas[0]]
        self._prediction = process.prediction_type
        self._in_pixels = in_pixels

    def step(self, index: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """Return the latents at the next timestep from those at the `index`-th and what is predicted there."""
        signal, noise = self._alphas[index] ** 0.5, (1 - self._alphas[index]) ** 0.5
        if self._prediction == "Epsilon":
            image, direction = (latents - noise * prediction) / signal, prediction
        elif self._prediction == "Sample":
            image, direction = prediction, (latents - signal * prediction) / noise
        else:
            image, direction = signal * latents - noise * prediction, signal * prediction + noise * latents
        if self._in_pixels:
            image = image.clamp(-1, 1)
        after = self._alphas[index + 1]
        return after**0.5 * image + (1 - after) ** 0.5 * direction


class _Euler:
    """Euler's method on the flow, as FlowMatchEulerDiscreteScheduler of diffusers takes it."""

    def __init__(self, process: FlowProcess, steps: int) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=process.shift)
        self._scheduler.set_timesteps(steps)
        self.times: Tensor = self._scheduler.sigmas[:-1].float()

    def step(self, index: int, prediction: Tensor, latents: Tensor) -> Tensor:
        moved: Tensor = self._scheduler.step(prediction, self._scheduler.timesteps[index], latents).prev_sample
        return moved
