"""Dropout without a generator: whether an element is dropped is a function of (seed, step, slot of the batch, layer).

So a resumed run drops what the undisturbed one would have dropped, an image is treated alike whichever process has it
and however batches are cut, and recomputing activations in the backward pass finds the same masks. Bits are made on the
device by integer arithmetic that is exact everywhere: keys of 64 bits for each image and layer from Philox, and the
finaliser of MurmurHash3 (Appleby, public domain) over (key, index of the element).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_trainer.rng import Purpose, stream

_FIRST, _SECOND = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32  # MurmurHash3's multipliers as int32
_GOLDEN = 0x9E3779B9 - 2**32


class Masks:
    """The keys of one micro-batch for all layers with dropout; an empty one where nothing is dropped."""

    def __init__(self) -> None:
        self._layers = 0
        self._keys: Tensor | None = None

    def __bool__(self) -> bool:
        """Return whether any layer drops anything."""
        return self._layers > 0

    def layer(self, probability: float) -> KeyedDropout:
        """Return the dropout of another layer; its place in the order of calls is part of its keys."""
        self._layers += 1
        return KeyedDropout(self, self._layers - 1, probability)

    def draw(self, seed: int, slots: Sequence[tuple[int, int]], *, device: torch.device | str) -> None:
        """Set the keys for images at (step, slot of the batch), in the order of the micro-batch."""
        if not self._layers:
            return
        drawn = [
            stream(seed, Purpose.ADAPTER_DROPOUT, step, slot).integers(
                -(2**31), 2**31, size=(self._layers, 2), dtype=np.int64
            )
            for step, slot in slots
        ]
        self._keys = torch.from_numpy(np.stack(drawn).astype(np.int32)).to(device, non_blocking=True)

    def keys(self, layer: int, images: int) -> Tensor:
        """Return the keys of one layer, int32 [images, 2]. Raises ValueError when they were drawn for others."""
        if self._keys is None or len(self._keys) != images:
            drawn = 0 if self._keys is None else len(self._keys)
            raise ValueError(f"dropout: {images} images are computed, keys were drawn for {drawn}")
        return self._keys[:, layer]


class KeyedDropout(nn.Module):
    """Dropout of inputs [B, ...] in training mode: zeroes with a probability, and scales what is left to its mean."""

    def __init__(self, masks: Masks, layer: int, probability: float) -> None:
        super().__init__()
        self._masks = masks
        self._layer = layer
        self.p = probability

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs with some of them zero."""
        if not self.training or self.p == 0:
            return inputs
        keys = self._masks.keys(self._layer, len(inputs))
        kept = kept_elements(keys, inputs[0].numel(), self.p).view(inputs.shape)
        return inputs * kept.to(inputs.dtype).mul_(1 / (1 - self.p))


def key_dropout(module: nn.Module, masks: Masks) -> None:
    """Replace the dropout that a network has of its own (few have) by one that needs no generator, in place."""
    for path, layer in sorted(module.named_modules()):
        if isinstance(layer, nn.Dropout) and layer.p > 0:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, masks.layer(layer.p))


@torch.no_grad()
def kept_elements(keys: Tensor, count: int, probability: float) -> Tensor:
    """Return which of `count` elements of each image are kept, bool [B, count]. `keys` are int32 [B, 2]."""
    index = torch.arange(count, dtype=torch.int32, device=keys.device) * _GOLDEN
    bits = _mixed(index + keys[:, :1])
    bits = _mixed(bits ^ keys[:, 1:])
    return bits >= round(probability * 2**32) - 2**31


def _mixed(bits: Tensor) -> Tensor:
    """Return MurmurHash3's fmix32 of int32; products wrap around, shifts bring in zeros."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * _FIRST
    bits = bits ^ ((bits >> 13) & 0x7FFFF)
    bits = bits * _SECOND
    return bits ^ ((bits >> 16) & 0xFFFF)
