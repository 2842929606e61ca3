"""How sharp an image is, at the size at which it is trained on."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def sharpness(picture: Image.Image, *, side: int) -> float:
    """Return the variance of the Laplacian of the grey picture (0 to 255), scaled down to the area `side` x `side`.

    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy", with the kernel of four neighbours, as
    OpenCV's `Laplacian` has it; the outermost pixels are left out. A photograph that is blurred when seen at full size
    may be sharp at the resolution of a training, so that is where it is measured; nothing is scaled up.
    """
    grey = picture.convert("L")
    scale = math.sqrt(side * side / (grey.width * grey.height))
    if scale < 1:
        smaller = max(3, round(grey.width * scale)), max(3, round(grey.height * scale))
        grey = grey.resize(smaller, Image.Resampling.LANCZOS)
    x = np.asarray(grey, dtype=np.float32)
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    return float(laplacian.var()) if laplacian.size else 0.0
