"""A built cache, read through memory maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Cache:
    """Latents and text embeddings of a dataset lock. Picklable: a worker opens the files for itself."""

    def __init__(self, latents: Sequence[Sequence[str]], text: Mapping[str, str], places: Mapping[str, Path]) -> None:
        """`latents`: entry of each image and variant; `text`: entry of each caption; `places`: file of each entry."""
        self._latents = latents
        self._text = text
        self._places = places
        self._open: dict[Path, Any] = {}

    def latents(self, image: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the scaled latents, fp32 [4, h, w] each (stored as bf16).

        `image` indexes `lock.images`; a held-out image has variant 0 only.
        """
        mean, std = self._entry(self._latents[image][variant]).float()
        return mean, std

    def text(self, caption: str) -> torch.Tensor:
        """Return the text embedding of a caption of the dataset, or of "", fp32 [77, D] (stored as bf16)."""
        return self._entry(self._text[caption]).float()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _entry(self, key: str) -> torch.Tensor:
        path = self._places[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        tensor: torch.Tensor = self._open[path].get_tensor(key)
        return tensor
