"""The scores themselves, by torchmetrics. Nothing here draws a random number."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_trainer.scoring.clip import Clip


def clip_score(clip: Clip, picture: Image.Image, words: str) -> float:
    """Return 100 max(cos, 0) of a picture and a text (Hessel et al. 2021, arXiv 2104.08718, with torchmetrics' 100)."""
    from torchmetrics.functional.multimodal import clip_score as of_torchmetrics

    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    pair = cast("tuple[object, object]", (clip, clip))
    return of_torchmetrics(pixels, words, model_name_or_path=lambda: pair).item()


def kid(real: Tensor, drawn: Tensor) -> float:
    """Return the squared kernel distance of two sets of as many features [N, D]; N is 2 at least.

    The kernel is KID's, (x . y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401). Row i of either belongs to one
    caption, so that these two are no independent draws: such pairs are left out, as in the one-sample U-statistic of
    Gretton et al. 2012 (JMLR 13, lemma 6, equation 4), which is unbiased for pairs. All N are one subset, in fp64, so
    that nothing depends on a choice of subsets. Near 0 for equal distributions, and below it as often as above.
    """
    from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

    x, y = real.double(), drawn.double()
    across, count = poly_kernel(x, y), len(x)
    # The mean that follows is over all pairs: what is left out is replaced by the mean of what is not.
    across.fill_diagonal_(0.0)
    across *= count / (count - 1)
    return maximum_mean_discrepancy(poly_kernel(x, x), across, poly_kernel(y, y)).item()
