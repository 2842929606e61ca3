"""How noisy the images of a batch are made: places on the way from image (0) to noise (1)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Sampling = Literal["Uniform", "LogitNormal"]


def uniform_or_logit_normal(numbers: np.random.Generator, sampling: Sampling) -> float:
    """Return one place in (0, 1]; logit-normal with mean 0 and deviation 1 (Esser et al. 2024, arXiv 2403.03206)."""
    if sampling == "Uniform":
        return 1.0 - float(numbers.random())
    return 1.0 / (1.0 + math.exp(-float(numbers.standard_normal())))
