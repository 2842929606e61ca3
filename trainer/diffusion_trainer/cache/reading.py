"""A built cache, read through memory maps."""

from __future__ import annotations

import torch


class Cache:
    """Latents and text embeddings of a dataset lock. Picklable: a worker opens the files for itself."""

    def latents(self, image: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the scaled latents, fp32 [4, h, w] each (stored as bf16).

        `image` indexes `lock.images`; a held-out image has variant 0 only.
        """
        raise NotImplementedError

    def text(self, caption: str) -> torch.Tensor:
        """Return the text embedding of a caption of the dataset, or of "", fp32 [77, D] (stored as bf16)."""
        raise NotImplementedError
