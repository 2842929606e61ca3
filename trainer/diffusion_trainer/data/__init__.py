"""From a folder of pictures to the batches of any optimizer step.

Belongs here: reading dataset layouts, decoding hostile images, the frozen dataset lock, aspect-ratio buckets, crops and
flips, the plan (which images make up which step) and the loader that turns a step into tensors.
Does not belong here: encoders and what they produce (`cache`), the loss (`objective`), storage SDKs (`objectstore`).

Everything random is a function of (seed, purpose, indices): see `diffusion_trainer.rng`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion_trainer.data.captions import CaptionVariants
    from diffusion_trainer.data.folders import Folder, folders_of
    from diffusion_trainer.data.freezing import freeze
    from diffusion_trainer.data.loader import Batch, CachedTensors, Share, open_loader
    from diffusion_trainer.data.lock import DatasetLock, LockedImage
    from diffusion_trainer.data.pictures import Pictures
    from diffusion_trainer.data.plan import Plan, Slot
    from diffusion_trainer.data.transforms import Variants

__all__ = [
    "Batch",
    "CachedTensors",
    "CaptionVariants",
    "DatasetLock",
    "Folder",
    "LockedImage",
    "Pictures",
    "Plan",
    "Share",
    "Slot",
    "Variants",
    "folders_of",
    "freeze",
    "open_loader",
]

_ROOMS = {
    "captions": ("CaptionVariants",),
    "folders": ("Folder", "folders_of"),
    "freezing": ("freeze",),
    "loader": ("Batch", "CachedTensors", "Share", "open_loader"),
    "lock": ("DatasetLock", "LockedImage"),
    "pictures": ("Pictures",),
    "plan": ("Plan", "Slot"),
    "transforms": ("Variants",),
}


def __getattr__(name: str) -> object:
    """Import on first use: the preflight looks at datasets and models in a process without torch."""
    room = next((room for room, names in _ROOMS.items() if name in names), None)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{room}"), name)
