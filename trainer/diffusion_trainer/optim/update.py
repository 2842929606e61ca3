"""One optimizer step: clip, update, clear; or nothing at all, where the gradients are no numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.optim.scaling import LossScale


@dataclass(frozen=True)
class Update:
    """What became of a step; all on the device.

    `norm` is that of the gradients before clipping; `skipped` says that nothing was changed, and `broken` that no loss
    scale explains it: the loss is no number, or the gradients are none although they were not scaled.
    """

    norm: Tensor
    skipped: Tensor
    broken: Tensor


def apply_update(
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float,
    max_grad_norm: float | None,
    loss: Tensor,
    scale: LossScale | None = None,
) -> Update:
    """Take one optimizer step with the gradients that are there, and clear them.

    The step is skipped, and the optimizer's state left alone, when loss or norm are not finite. Gradients and loss must
    be the same in all processes; then so is that decision. `scale` is what the gradients were multiplied by.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scale is not None:
        torch._foreach_mul_(gradients, 1 / scale.value)  # exact: it is a power of two
    norm = torch.nn.utils.get_total_norm(gradients)
    unusable = ~(torch.isfinite(norm) & torch.isfinite(loss))
    if max_grad_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    _step_unless(unusable, optimizer)
    optimizer.zero_grad(set_to_none=True)
    broken = unusable
    if scale is not None:
        broken = unusable & (scale.exhausted | ~torch.isfinite(loss))
        scale.note(unusable)
    return Update(norm.detach(), unusable, broken)


def _step_unless(unusable: Tensor, optimizer: Any) -> None:
    """Step unless the flag is set, which fused optimizers read on the device; with others the host waits for it."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, unusable.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not unusable:
        optimizer.step()
