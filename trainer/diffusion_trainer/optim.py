"""The optimizer, its learning rate as a closed form of the step, and its state as named tensors.

No scheduler object: what a step's learning rate is depends on the step alone, so there is nothing to save, and neither
the number of processes nor gradient accumulation can shift it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion_api.training import LRSchedule, Optimizer

DECAY_SHARE = 0.1
"""Share of the steps in which WarmupStableDecay falls to 0 (MiniCPM, arXiv 2404.06395)."""
INVERSE_SQRT_TIMESCALE = 10_000
"""Timescale of InverseSqrt without a warm-up, as in transformers."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


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


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], settings: Optimizer, *, device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW over the parameters, in their order; fused into one kernel on CUDA."""
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=0.0,  # set before every step
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )


def apply_update(optimizer: torch.optim.Optimizer, *, learning_rate: float, max_grad_norm: float | None) -> Tensor:
    """Clip, take one optimizer step and clear the gradients; return the norm before clipping, still on the device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """Return the moments as `<parameter>/exp_avg` and `<parameter>/exp_avg_sq`; empty before the first step."""
    state = optimizer.state
    return {
        f"{name}/{moment}": state[parameter][moment]
        for name, parameter in parameters.items()
        if parameter in state
        for moment in _MOMENTS
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    tensors: Mapping[str, Tensor],
    step: int,
) -> None:
    """Put back what `optimizer_tensors` returned after `step` steps. The parameters are those of `make_optimizer`.

    Raises KeyError when a parameter has no moments in `tensors`, ValueError when one has a parameter's no more.
    """
    wanted = {f"{name}/{moment}" for name in parameters for moment in _MOMENTS} if step else set()
    if surplus := sorted(set(tensors) - wanted):
        raise ValueError(f"the checkpoint's optimizer has {surplus[0]} and {len(surplus) - 1} more of no parameter")
    if step == 0:
        return
    state = {
        index: {"step": torch.tensor(float(step)), **{moment: tensors[f"{name}/{moment}"] for moment in _MOMENTS}}
        for index, name in enumerate(parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
