"""From noise to latents: DDIM for noise schedules, Euler for flows, both with classifier-free guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.models.base import Conditioning, Family
from diffusion_trainer.objective import DiscreteProcess, FlowProcess, Process

_PREDICTIONS = {"Epsilon": "epsilon", "VPrediction": "v_prediction", "Sample": "sample"}


def sampler_name(process: Process) -> str:
    """Return the name of the sampler that is used, as user interfaces write it."""
    return "Euler" if isinstance(process, FlowProcess) else "DDIM"


def denoised(
    family: Family, noise: Tensor, conditioning: Conditioning, *, geometry: Tensor, steps: int, guidance: float
) -> Tensor:
    """Return latents [1, C, h, w] from noise of that shape.

    conditioning: [2, ...], of the negative prompt and the prompt, empty for a family without text; geometry: [6].
    """
    scheduler, times = _prepared(family, steps)
    guided = guidance != 1 and bool(conditioning)
    rows = {name: (both if guided else both[1:]).to(family.device) for name, both in conditioning.items()}
    places = geometry.expand(2 if guided else 1, -1).to(family.device)
    latents = noise.to(family.device)
    for timestep, time in zip(scheduler.timesteps, times, strict=True):  # on the CPU: nothing here waits for the GPU
        prediction = _predicted(family, latents.expand(len(places), -1, -1, -1), time, rows, places)
        if guided:
            without, along = prediction.chunk(2)
            prediction = without + guidance * (along - without)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def _predicted(family: Family, latents: Tensor, time: Tensor, rows: Conditioning, geometry: Tensor) -> Tensor:
    times = torch.full((len(latents),), time.item(), dtype=time.dtype, device=family.device)
    mixed = family.dtype != torch.float32
    with torch.autocast(family.device.type, dtype=family.dtype if mixed else torch.bfloat16, enabled=mixed):
        prediction = family.predict(latents, times, rows, geometry)
    return prediction.float()


def _prepared(family: Family, steps: int) -> tuple[Any, Tensor]:
    """Return a scheduler of diffusers with its timesteps set, and the time of the family's process at each."""
    if isinstance(family.process, FlowProcess):
        return _flow(family.process, steps)
    return _discrete(family.process, steps, in_pixels=family.latent_scale == 1)


def _discrete(process: DiscreteProcess, steps: int, *, in_pixels: bool) -> tuple[Any, Tensor]:
    """`in_pixels`: values are known to be in [-1, 1], and the last step goes to the image itself (DDIM's own rule)."""
    from diffusers import DDIMScheduler

    alphas = process.alphas_cumprod
    scheduler = DDIMScheduler(
        num_train_timesteps=len(alphas),
        clip_sample=in_pixels,
        set_alpha_to_one=in_pixels,
        steps_offset=0 if in_pixels else 1,
        prediction_type=_PREDICTIONS[process.prediction_type],
        # With no signal at all at the last timestep, sampling has to begin exactly there (arXiv 2305.08891).
        timestep_spacing="trailing" if alphas[-1] == 0 else "leading",
    )
    scheduler.alphas_cumprod = alphas
    scheduler.final_alpha_cumprod = torch.tensor(1.0) if in_pixels else alphas[0]
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps.long()


def _flow(process: FlowProcess, steps: int) -> tuple[Any, Tensor]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=process.shift)
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.sigmas[:-1].float()
