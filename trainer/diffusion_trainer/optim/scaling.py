"""The loss scale of fp16: losses are multiplied by it, so that small gradients do not vanish (arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""Steps in a row without overflow after which the scale is doubled. Both numbers are those of torch's GradScaler."""


class LossScale:
    """A power of two on the device: halved after each overflow, doubled after a long time without one, never below 1.

    torch's own GradScaler waits for the device in each step, and cannot leave its state to somebody else.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._scale = torch.tensor(FIRST_SCALE, device=device)
        self._calm = torch.tensor(0, dtype=torch.int32, device=device)

    @property
    def value(self) -> Tensor:
        """Return the scale, fp32, on the device."""
        return self._scale

    @property
    def exhausted(self) -> Tensor:
        """Return whether it cannot fall any further, so that an overflow is none of its doing."""
        return self._scale <= 1

    def note(self, overflowed: Tensor) -> None:
        """Adapt to a step: `overflowed` says whether its gradients were finite no more."""
        calm = torch.where(overflowed, 0, self._calm + 1)
        grown = torch.where(calm >= GROWTH_INTERVAL, self._scale * 2, self._scale)
        self._scale = torch.where(overflowed, self._scale / 2, grown).clamp(min=1)
        self._calm = torch.where(calm >= GROWTH_INTERVAL, 0, calm).to(torch.int32)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold."""
        return {"scale": self._scale, "calm": self._calm}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        self._scale = tensors["scale"].to(self._scale)
        self._calm = tensors["calm"].to(self._calm)
