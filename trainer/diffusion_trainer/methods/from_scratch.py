"""A denoiser that knows nothing yet: random weights of a given configuration, without a generator's state."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_trainer.rng import Purpose, stream


def initialise(denoiser: nn.Module, *, seed: int) -> None:
    """Give every weight the distribution that torch gives it, each drawn from a stream of its own name.

    Linear layers and convolutions: uniform in +-1/sqrt(inputs), weights and biases (torch's `reset_parameters`);
    embeddings: normal; norms: ones and zeros. Buffers stay as they are.

    Raises:
        ValueError: for a weight of any other kind of module; no denoiser of a family has one.

    """
    for path, module in sorted(denoiser.named_modules()):
        for name, parameter in sorted(module.named_parameters(recurse=False)):
            values = _drawn(module, name, parameter, stream(seed, Purpose.INITIALISATION, f"{path}.{name}"))
            with torch.no_grad():
                parameter.copy_(values)


def _drawn(module: nn.Module, name: str, parameter: Tensor, numbers: np.random.Generator) -> Tensor:
    """Return fp32 values of one parameter, on the CPU."""
    shape = tuple(parameter.shape)
    if isinstance(module, nn.Linear | nn.Conv2d):
        bound = 1 / math.sqrt(module.weight[0].numel())
        return torch.from_numpy((numbers.random(shape, dtype=np.float32) * 2 - 1) * np.float32(bound))
    if isinstance(module, nn.Embedding):
        return torch.from_numpy(numbers.standard_normal(shape, dtype=np.float32))
    if "Norm" in type(module).__name__:
        return torch.full(shape, 0.0 if name == "bias" else 1.0)
    raise ValueError(f"initialise: {type(module).__name__}.{name} has no rule; give it one")
