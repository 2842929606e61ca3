"""Tensors in a memory-mapped file that is a complete safetensors file at every moment between two writes.

This is how tensors get to the uploader's process: the trainer copies them straight into the pages of the file (one copy
from the device, no serialization), and the uploader hashes and uploads the same pages. Next time the same tensors come,
the same pages are written again, so that the stall is one copy into memory that is already there. Pipes or torch's
shared memory would cost a second copy and a serialization, and pickle.
Format: https://github.com/huggingface/safetensors (8 bytes of length, JSON, data without gaps).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_trainer.errors import StorageUnavailable

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_ALIGNED = 64  # the data begins at a multiple of every item's size


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor lies in a file: its first byte counted from the beginning of the file, and its bytes."""

    header: bytes
    spans: Mapping[str, tuple[int, int]]
    size_bytes: int


def layout_of(group: str, tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Return the layout of a group. Raises TypeError for tensors that a checkpoint cannot hold."""
    # Large items first, so that every tensor lies at a multiple of its item's size; then by name: the same tensors give
    # the same file whatever order they come in.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    listed: dict[str, object] = {}
    starts: dict[str, tuple[int, int]] = {}
    position = 0
    for name, tensor in ordered:
        dtype = _dtype_of(group, name, tensor)
        length = tensor.numel() * tensor.element_size()
        listed[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, position + length]}
        starts[name] = (position, length)
        position += length
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    header = struct.pack("<Q", len(text)) + text
    spans = {name: (start + len(header), length) for name, (start, length) in starts.items()}
    return Layout(header=header, spans=spans, size_bytes=len(header) + position)


class MappedFile:
    """A safetensors file of one layout, mapped into memory."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Make the file. Raises `StorageUnavailable` when the volume has not the room (never SIGBUS later)."""
        import torch

        self.path = path
        self.layout = layout
        try:
            with path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, layout.size_bytes)
                file.write(layout.header)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageUnavailable(
                f"stage checkpoint: {path} cannot be given {layout.size_bytes} bytes ({error.strerror}); "
                "give the staging folder's volume room for one checkpoint"
            ) from error
        self._bytes = torch.from_file(str(path), shared=True, size=layout.size_bytes, dtype=torch.uint8)

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors into the file. CUDA copies may still run afterwards: synchronize before handing over."""
        for name, tensor in tensors.items():
            start, length = self.layout.spans[name]
            if length:
                target = self._bytes[start : start + length].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor.detach(), non_blocking=True)

    def remove(self) -> None:
        """Delete the file; whoever has it open or mapped keeps what is in it."""
        self.path.unlink(missing_ok=True)


def _dtype_of(group: str, name: str, tensor: torch.Tensor) -> str:
    import torch

    what = f"snapshot: tensor {name!r} of group {group!r}"
    if name == "__metadata__" or not isinstance(name, str):
        raise TypeError(f"{what} has a name that safetensors reserves; rename it")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"{what} is {'on meta' if tensor.is_meta else tensor.layout}; gather it to a dense tensor first"
        )
    dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise TypeError(f"{what} has dtype {tensor.dtype}; a checkpoint holds {', '.join(_DTYPES)}")
    return dtype
