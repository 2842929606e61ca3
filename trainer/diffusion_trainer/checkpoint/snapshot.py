"""What one checkpoint holds, in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
STATE_NAME = "state.json"
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


def file_of(group: str) -> str:
    """Return the name of the file of a group."""
    return f"{group}.safetensors"


def encode_scalars(scalars: Mapping[str, JSON]) -> bytes:
    """Return the scalars as JSON. Raises TypeError for what would come back as something else (tuples, integer keys).

    NaN and infinities are written as Python does: a checkpoint is read by the trainer only.
    """
    _check(scalars, "scalars")
    return json.dumps(dict(scalars), sort_keys=True).encode()


def _check(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise TypeError(f"snapshot: {where} has the key {name!r}; JSON keys are strings")
            _check(item, f"{where}[{name!r}]")
    elif type(value) is list:
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif value is not None and type(value) not in {bool, int, float, str}:
        raise TypeError(
            f"snapshot: {where} is {type(value).__name__}, which JSON does not keep; convert it to a plain type"
        )
