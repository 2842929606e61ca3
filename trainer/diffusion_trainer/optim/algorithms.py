"""The optimizers of the API, from libraries that are kept. Which numbers stand for what is left out: the contract says.

| name | from | why this one |
|---|---|---|
| AdamW | torch, fused | one kernel for all parameters, and it can be told on the device to skip a step |
| AdamW8bit | bitsandbytes | the only kept one with moments of 8 bits, in blocks of 256; below 4096 elements they are fp32 |
| Adafactor | transformers | takes an absolute learning rate; torch's scales it by the size of the weights, so that the half of an adapter that begins at zero would stay there |
| Prodigy, Lion | pytorch-optimizer | batched kernels, one look at the device per step where the authors' Prodigy takes two per parameter; released monthly |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion_api.training import Optimizer
from diffusion_trainer.errors import BadConfig
from diffusion_trainer.fitting import in_parts
from diffusion_trainer.hiding import import_bitsandbytes

ParameterGroups = list[dict[str, Any]]

_BATCHED = frozenset({"Prodigy", "Lion"})
"""Optimizers whose kernels make a temporary as large as all weights of a group."""


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike. `lr_scale` times the run's learning rate is theirs."""

    parameters: Mapping[str, nn.Parameter]
    lr_scale: float = 1.0
    decayed: bool = True
    """Whether the optimizer's weight decay applies."""


def make_optimizer(groups: Sequence[Group], settings: Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, over all groups.

    Weight decay leaves out what has one dimension (biases, scales of norms): decaying those bounds nothing and costs
    accuracy (He et al. 2019, arXiv 1812.01187, section 3.1; diffusers' and nanoGPT's groups are the same).

    Raises:
        BadConfig: the optimizer needs a library that is not there, or cannot have several learning rates.

    """
    return _MAKERS[settings.name](_parameter_groups(groups, settings), settings.filled())


def _parameter_groups(groups: Sequence[Group], settings: Optimizer) -> ParameterGroups:
    """Return torch's groups: each of ours in two parts, with and without weight decay, where both have members."""
    found: ParameterGroups = []
    for group in groups:
        members = list(group.parameters.values())
        decayed = [p for p in members if group.decayed and p.ndim > 1]
        rest = [p for p in members if not (group.decayed and p.ndim > 1)]
        for part, weight_decay in ((decayed, settings.weight_decay), (rest, 0.0)):
            pieces = in_parts(part) if settings.name in _BATCHED else [part]
            found += [{"params": p, "weight_decay": weight_decay, "lr_scale": group.lr_scale} for p in pieces if p]
    return found


def _adamw(groups: ParameterGroups, settings: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=_betas(settings), eps=_there(settings.epsilon), fused=True)


def _adamw_8bit(groups: ParameterGroups, settings: Optimizer) -> torch.optim.Optimizer:
    try:
        library = import_bitsandbytes()
    except ImportError as error:
        raise _missing("AdamW8bit", "bitsandbytes", extra="optimizers") from error
    made: torch.optim.Optimizer = library.optim.AdamW8bit(
        groups, lr=0.0, betas=_betas(settings), eps=_there(settings.epsilon)
    )
    return made


def _adafactor(groups: ParameterGroups, settings: Optimizer) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(
        groups,
        lr=0.0,
        eps=(_there(settings.epsilon), 1e-3),
        beta1=settings.beta1,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
    return made


def _prodigy(groups: ParameterGroups, settings: Optimizer) -> torch.optim.Optimizer:
    if len({group["lr_scale"] for group in groups}) > 1:
        raise BadConfig(
            "training.optimizer.name is Prodigy, which finds one learning rate for everything, but "
            "model.textEncoder.learningRate is another one than training.learningRate; make them equal, or use AdamW"
        )
    try:
        from pytorch_optimizer import Prodigy
    except ImportError as error:
        raise _missing("Prodigy", "pytorch-optimizer", extra="optimizers") from error
    # Bias correction and the safeguard are what its authors advise for schedules with a warm-up, and for diffusion.
    made: torch.optim.Optimizer = Prodigy(
        groups,
        lr=1.0,
        betas=_betas(settings),
        eps=_there(settings.epsilon),
        bias_correction=True,
        safeguard_warmup=True,
        foreach=True,
    )
    return made


def _lion(groups: ParameterGroups, settings: Optimizer) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import Lion
    except ImportError as error:
        raise _missing("Lion", "pytorch-optimizer", extra="optimizers") from error
    made: torch.optim.Optimizer = Lion(groups, lr=0.0, betas=_betas(settings), foreach=True)
    return made


_MAKERS: dict[str, Callable[[ParameterGroups, Optimizer], torch.optim.Optimizer]] = {
    "AdamW": _adamw,
    "AdamW8bit": _adamw_8bit,
    "Adafactor": _adafactor,
    "Prodigy": _prodigy,
    "Lion": _lion,
}


def _betas(settings: Optimizer) -> tuple[float, float]:
    return _there(settings.beta1), _there(settings.beta2)


def _there(number: float | None) -> float:
    """Return a number that `Optimizer.filled` gave to the algorithm. Raises ValueError when it has none."""
    if number is None:
        raise ValueError("make_optimizer: the settings are not filled in")
    return number


def _missing(name: str, library: str, *, extra: str) -> BadConfig:
    return BadConfig(
        f"training.optimizer.name is {name}, for which this trainer lacks {library}; use AdamW, or an image with "
        f"diffusion-operator[trainer,{extra}]"
    )
