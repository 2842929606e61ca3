"""The learning rate as a closed form of the optimizer step.

No scheduler object: what a step's learning rate is depends on the step alone, so there is nothing to save, and neither
the number of processes nor gradient accumulation can shift it.
"""

from __future__ import annotations

import math

from diffusion_api.training import LRSchedule

DECAY_SHARE = 0.1
"""Share of the steps in which WarmupStableDecay falls to 0 (MiniCPM, arXiv 2404.06395)."""
INVERSE_SQRT_TIMESCALE = 10_000
"""Timescale of InverseSqrt without a warm-up, as in transformers."""


def lr_at(step: int, schedule: LRSchedule, *, peak: float, total_steps: int) -> float:
    """Return the learning rate of the update that follows `step` optimizer steps (the first one has step 0).

    Warm-up is linear from 0; every schedule but Constant and InverseSqrt reaches 0 at `total_steps`.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return peak * _shape(step, schedule, done=done, total_steps=total_steps)


def _shape(step: int, schedule: LRSchedule, *, done: float, total_steps: int) -> float:
    """Return the factor after the warm-up, `done` being the share of the steps after it."""
    match schedule.name:
        case "Constant":
            factor = 1.0
        case "Linear":
            factor = 1.0 - done
        case "Cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
        case "CosineWithRestarts":
            factor = 0.0 if done >= 1 else 0.5 * (1.0 + math.cos(math.pi * (schedule.cycles * done % 1.0)))
        case "Polynomial":
            factor = (1.0 - done) ** schedule.power
        case "InverseSqrt":
            timescale = schedule.warmup_steps or INVERSE_SQRT_TIMESCALE
            factor = 1.0 / math.sqrt((step - schedule.warmup_steps + timescale) / timescale)
        case "WarmupStableDecay":
            decay = max(1, round(DECAY_SHARE * total_steps))
            factor = max(0.0, min(1.0, (total_steps - step) / decay))
    return factor
