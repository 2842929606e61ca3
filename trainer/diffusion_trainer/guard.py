"""What becomes of losses and gradients that are no numbers: such steps are skipped, counted, and in a row an end.

The count is kept on the device, where steps are skipped, and read a few steps later, when it has come without anybody
waiting for it. As all processes have the same sums, they read the same count at the same step, and decide alike.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_api.training import NonFinite

LAG = 2
"""Steps between a step and the look at its count: as far ahead of the device as the host may be."""
LEARNING_RATE_FACTOR = 0.5
"""Of the learning rate after going back."""
MOST_ROLL_BACKS = 3


class RollBack(Exception):  # noqa: N818 - no error: what to do next
    """Go back to the newest checkpoint, with less of a learning rate."""


@dataclass(frozen=True)
class Streak:
    """Steps in a row that were skipped: the last one, and how many."""

    step: int
    length: int


class Guard:
    """Counts broken steps. A checkpoint has to hold `roll_backs` alone, for none is made while there is a count.

    (It would hold the weights that led there, and going back to them would lead there again.)
    """

    def __init__(self, settings: NonFinite, device: torch.device | str) -> None:
        self._settings = settings
        self._count = torch.zeros((), dtype=torch.int32, device=device)
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.roll_backs = 0
        """How often the run went back so far."""

    @property
    def factor(self) -> float:
        """Return what is left of the learning rate."""
        return LEARNING_RATE_FACTOR**self.roll_backs

    def note(self, step: int, broken: Tensor) -> None:
        """Count a step; `broken` is on the device, and nobody waits for it."""
        self._count = torch.where(broken, self._count + 1, 0).to(torch.int32)
        if self._count.is_cuda:
            there = torch.empty((), dtype=torch.int32, pin_memory=True)
            there.copy_(self._count, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._sent.append((step, there, event))
        else:
            self._sent.append((step, self._count, None))

    def streak(self, *, lag: int = LAG) -> Streak | None:
        """Return the steps in a row that are too many, None while there are none; `lag` 0 looks at the last step."""
        while len(self._sent) > lag:
            step, count, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            if (length := int(count)) >= self._settings.limit:
                return Streak(step, length)
        return None

    @property
    def calm(self) -> bool:
        """Return whether the last step was none of those. Waits for the device."""
        return int(self._count) == 0

    @property
    def may_go_back(self) -> bool:
        """Return whether the policy is to go back, and that has not been done too often."""
        return self._settings.policy == "RollBack" and self.roll_backs < MOST_ROLL_BACKS

    def resume(self, roll_backs: int) -> None:
        """Go on from a checkpoint, which may be older than what this attempt has learned."""
        self.roll_backs = max(self.roll_backs, roll_backs)

    def go_back(self) -> None:
        """Halve the learning rate and forget what was counted."""
        self.roll_backs += 1
        self._count = torch.zeros_like(self._count)
        self._sent.clear()
