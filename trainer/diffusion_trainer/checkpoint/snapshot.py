"""What one checkpoint holds, in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
GROUP = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after `step` optimizer steps.

    `tensors` maps a group ("model", "optimizer", "ema": one file each) to names and tensors of any device, layout and
    dtype that safetensors knows; dtypes, shapes and bits come back exactly, always on the CPU, contiguous, each with
    memory of its own. `scalars` is everything else, in JSON's types (floats come back exactly; tuples do not exist).
    """

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    scalars: Mapping[str, JSON]

    def __post_init__(self) -> None:
        """Raise ValueError for a negative step or a group whose name cannot be a file's."""
        if self.step < 0:
            raise ValueError(f"Snapshot.step is {self.step}; steps count from 0")
        for group in self.tensors:
            if not GROUP.fullmatch(group) or group == "state":
                raise ValueError(
                    f"Snapshot.tensors: group {group!r} cannot name a file; use a-z, 0-9, - and _ (not 'state')"
                )
