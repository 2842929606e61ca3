"""Adapters added to the weights that they adapt."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffusion_api.method import LoRA
from diffusion_trainer.export.adapter_names import modules
from diffusion_trainer.methods.lora import DOWN, MAGNITUDE, UP


def merge(base: dict[str, Tensor], adapters: Mapping[str, Tensor], lora: LoRA) -> None:
    """Replace each adapted weight of `base` by W + alpha / rank * B @ A, its rows scaled to the magnitudes of DoRA.

    Sums are made in fp32; a weight keeps its precision.
    """
    for module in modules(adapters):
        name = f"{module}.weight"
        down, up = (adapters[module + part].cpu().float() for part in (DOWN, UP))
        merged = base[name].float() + lora.alpha / lora.rank * (up @ down)
        magnitude = adapters.get(module + MAGNITUDE)
        if magnitude is not None:
            merged *= (magnitude.cpu().float() / merged.norm(dim=1))[:, None]
        base[name] = merged.to(base[name].dtype)
