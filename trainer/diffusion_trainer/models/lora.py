"""Low-rank adapters on the denoiser, by PEFT, with our own stateless initialisation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from diffusion_api.method import LoRA
from diffusion_trainer.models.base import Family
from diffusion_trainer.rng import Purpose, stream

ADAPTER = "default"
_MARK = f".{ADAPTER}.weight"


def add_lora(family: Family, lora: LoRA, *, seed: int) -> dict[str, nn.Parameter]:
    """Freeze the denoiser, put adapters on its linear layers and return their parameters by stable names.

    Names are `<module path>.lora_A.weight` ([rank, in]) and `<module path>.lora_B.weight` ([out, rank]), sorted.
    Parameters are fp32 whatever the base is. A is drawn from a stream of its own name, B is zero, so that the adapted
    model begins as the base model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=family.lora_target_modules(lora.targets),
        init_lora_weights=True,
    )
    family.denoiser.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]):  # PEFT draws values that are replaced below
        inject_adapter_in_model(config, family.denoiser, ADAPTER)
    parameters = trainable(family)
    for name, parameter in parameters.items():
        parameter.data = _initial(name, parameter, seed=seed)
    return parameters


def trainable(family: Family) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters, as `add_lora` did."""
    found = {
        name.removesuffix(_MARK) + ".weight": parameter
        for name, parameter in family.denoiser.named_parameters()
        if name.endswith(_MARK) and (".lora_A." in name or ".lora_B." in name)
    }
    return dict(sorted(found.items()))


def _initial(name: str, parameter: nn.Parameter, *, seed: int) -> torch.Tensor:
    """Return fp32 values for one parameter: uniform in +-1/sqrt(in), as PEFT draws A, and 0 for B."""
    if name.endswith(".lora_B.weight"):
        return torch.zeros_like(parameter, dtype=torch.float32)
    bound = 1 / math.sqrt(parameter.shape[1])
    numbers = stream(seed, Purpose.INITIALISATION, name).random(tuple(parameter.shape), dtype=np.float32)
    return torch.from_numpy((numbers * 2 - 1) * np.float32(bound)).to(parameter.device)
