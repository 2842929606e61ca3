"""What a safetensors file holds, from its first bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod

from diffusion_trainer.errors import BadData

Shapes = Mapping[str, tuple[int, ...]]
_MOST_BYTES = 100_000_000  # as the library has it
_LENGTH_BYTES = 8


def read_shapes(read: Callable[[int, int], bytes], *, size: int, where: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor. `read` takes an offset and a length; `size` is the file's, in bytes.

    Format: https://github.com/huggingface/safetensors#format. Raises `BadData` when it is no such file.
    """
    length = int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if not 0 < length <= min(_MOST_BYTES, size - _LENGTH_BYTES):
        raise BadData(f"model.source {where} is no safetensors file; replace it by the original one")
    try:
        header = json.loads(read(_LENGTH_BYTES, length))
        shapes = {str(name): _shape(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadData(
            f"model.source {where} has no header of a safetensors file ({error}); replace it by the original one"
        ) from error
    return shapes


def _shape(entry: Mapping[str, object]) -> tuple[int, ...]:
    found = entry["shape"]
    if not isinstance(found, list) or not all(isinstance(side, int) and side >= 0 for side in found):
        raise ValueError(f"shape {found!r}")
    return tuple(found)


def elements(shapes: Shapes, prefix: str) -> int:
    """Return how many numbers the tensors below a prefix hold."""
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def count(shapes: Shapes, prefix: str) -> int:
    """Return how many numbered parts there are below a prefix. Raises ValueError when one in between is missing."""
    parts = {name.removeprefix(prefix).split(".", 1)[0] for name in shapes if name.startswith(prefix)}
    found = {int(part) for part in parts if part.isdecimal()}
    if found != set(range(len(found))):
        raise ValueError(f"of its {prefix}* some are missing")
    return len(found)
