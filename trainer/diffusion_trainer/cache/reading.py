"""A built cache, read through memory maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffusion_trainer.data.transforms import Geometry


class Cache:
    """Latents and texts of a dataset lock. Picklable: a worker opens the files for itself."""

    def __init__(
        self,
        latents: Sequence[Sequence[str]],
        text: Mapping[str, Mapping[str, str]],
        places: Mapping[str, Path],
        *,
        geometry: Sequence[Sequence[Geometry]],
    ) -> None:
        """`latents`, `geometry`: of each image and variant; `text`: of each caption; `places`: file of each entry."""
        self._latents = latents
        self._text = text
        self._places = places
        self._geometry = geometry
        self._open: dict[Path, Any] = {}

    def latents(self, image: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the scaled latents, fp32 [C, h, w] each (stored as bf16).

        `image` indexes `lock.images`; a held-out image has variant 0 only.
        """
        mean, std = self._entry(self._latents[image][variant]).float()
        return mean, std

    def geometry(self, image: int, variant: int) -> torch.Tensor:
        """Return what SDXL is told of one variant, fp32 [6]; see `data.transforms.Geometry`."""
        return self._geometry[image][variant].numbers()

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """Return the conditioning of a caption of the dataset, or of "", by the family's names.

        Embeddings are fp32 (stored as bf16), tokens int64.
        """
        found = {name: self._entry(key) for name, key in self._text[caption].items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _entry(self, key: str) -> torch.Tensor:
        path = self._places[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        tensor: torch.Tensor = self._open[path].get_tensor(key)
        return tensor
