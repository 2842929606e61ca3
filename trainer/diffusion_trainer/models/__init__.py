"""Model families: loading, encoding, and where adapters go. One file per family.

Belongs here: the `Family` protocol and its implementations, the check of a model's files before anything is loaded,
their conditioning. Does not belong here: what is trained (`methods`), losses and times (`objective`), file formats of
results (`export`).

Models are hostile input: safetensors only, no code from the model's folder, class names from an allow-list, no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion_trainer.models.base import Family
    from diffusion_trainer.models.fetching import fetch_model
    from diffusion_trainer.models.opening import open_model

__all__ = ["Family", "fetch_model", "open_model"]

_ROOMS = {
    "base": ("Family",),
    "fetching": ("fetch_model",),
    "opening": ("open_model",),
}


def __getattr__(name: str) -> object:
    """Import on first use: the preflight looks at datasets and models in a process without torch."""
    room = next((room for room, names in _ROOMS.items() if name in names), None)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{room}"), name)
