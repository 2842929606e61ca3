"""Low-rank adapters on the denoiser, by PEFT, with our own stateless initialisation."""

from __future__ import annotations

from diffusion_api.method import LoRA
from torch import nn

from diffusion_trainer.models.base import Family


def add_lora(family: Family, lora: LoRA, *, seed: int) -> dict[str, nn.Parameter]:
    """Freeze the denoiser, put adapters on its linear layers and return their parameters by stable names.

    Names are `<module path>.lora_A.weight` ([rank, in]) and `<module path>.lora_B.weight` ([out, rank]), sorted.
    Parameters are fp32 whatever the base is. A is drawn from a stream of its own name, B is zero, so that the adapted
    model begins as the base model.
    """
    raise NotImplementedError


def trainable(family: Family) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters, as `add_lora` did."""
    raise NotImplementedError
