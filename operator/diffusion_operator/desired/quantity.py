"""Kubernetes quantities, as far as they are multiplied."""

from __future__ import annotations

import re
from decimal import Decimal

_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)$")


def times(quantity: str, factor: int) -> str:
    """Return the quantity multiplied, in the same unit: twice "1.5Gi" is "3Gi"."""
    match = _QUANTITY.match(quantity)
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity: write e.g. 500m, 4 or 32Gi")
    number = Decimal(match[1]) * factor
    # A decimal's own text may be 1E+2, which is another quantity to Kubernetes.
    text = f"{number.normalize():f}"
    return text + match[2]
