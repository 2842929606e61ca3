"""An exponential moving average of the trained weights, which mostly draws and validates better than the last ones.

Every optimizer step counts, also one that was skipped: so the decay is a closed form of the step, and there is nothing
to save but the averages themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

POWER = 0.75
"""Of the warm-up: after 1,000 steps the last 180 or so make up the average. As diffusers trains unconditional models;
its documentation recommends 3/4 up to a few hundred thousand steps."""


def decay_at(step: int, *, limit: float) -> float:
    """Return the decay of the update after `step` steps (from 1): 1 - (1 + step)^-POWER, at most `limit`."""
    return min(limit, 1 - (1 + step) ** -POWER)


class Average:
    """Averages of parameters, fp32, on their device. They begin as the weights are now."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        self._parameters = dict(parameters)
        self._averages = {name: p.detach().float().clone() for name, p in parameters.items()}
        self._decay = decay

    def update(self, step: int) -> None:
        """Take the weights after `step` steps into the average. Two kernels or so, however many parameters."""
        weight = 1 - decay_at(step, limit=self._decay)
        weights = [p.detach() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, weight)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by the names of their parameters; live ones."""
        return dict(self._averages)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, average in self._averages.items():
            average.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange weights and averages for a while: nothing is copied or rounded, and nothing may be trained."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            weights = parameter.data
            parameter.data = self._averages[name]
            self._averages[name] = weights
