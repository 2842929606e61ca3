"""What the curve of evaluations says: which weights are best, when to stop, whether training images are memorised.

Closed forms of the evaluations, which every checkpoint holds. So a resumed run decides what an undisturbed one decides,
and no counter has to survive.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from diffusion_api.validation import EarlyStopping
from diffusion_trainer.curves import Evaluation

METRIC = "validation_loss"
ADVANTAGE = 0.5
"""Membership advantage from which images count as memorised, if it is no chance."""
CHANCE = 0.001
"""Probability, at each evaluation, that images are said to be memorised where training makes no difference."""
GENERALISATION_LOSS = 0.05


def best(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the evaluation with the lowest loss, the first of equals; None where there is none."""
    finite = [one for one in evaluations if math.isfinite(one.loss)]
    return min(finite, key=lambda one: one.loss, default=None)


def stops_after(evaluations: Sequence[Evaluation], rule: EarlyStopping | None) -> int | None:
    """Return the step after which to stop: that of the `patience`-th evaluation in a row without improvement.

    An evaluation improves when its loss is below the last one that did by more than `minDelta` of that. Slow progress
    adds up until it counts.
    """
    if rule is None:
        return None
    reference, waited = math.inf, 0
    for one in evaluations:
        if math.isfinite(one.loss) and (reference == math.inf or one.loss < reference * (1 - rule.min_delta)):
            reference, waited = one.loss, 0
            continue
        waited += 1
        if waited >= rule.patience:
            return one.step
    return None


def conclusion(rule: EarlyStopping, *, stopped: int | None, total: int, exported: int, loss: float | None) -> str:
    """Return how a run with early stopping ended: after step `stopped` of `total`, with the weights of `exported`."""
    why = (
        f"stopped early after step {stopped} of {total}: the validation loss did not fall by {rule.min_delta:.2%} in "
        f"{rule.patience} evaluations"
        if stopped is not None
        else f"all {total} steps are done"
    )
    value = f" (validation loss {loss:.4g})" if loss is not None else ""
    return f"{why}; the weights of step {exported}{value} are exported"


def advantage(held_out: Sequence[float], trained: Sequence[float]) -> float:
    """Return by how much the loss of an image gives away that it was trained on: 0 not at all, 1 always.

    Membership advantage of the adversary who knows the best threshold and says "trained on" of what is not above it:
    true positives less false positives (Yeom et al. 2018, arXiv 1709.01604, definition 4; for diffusion models: Carlini
    et al. 2023, arXiv 2301.13188, section 5.1). That is the one-sided statistic of Kolmogorov and Smirnov. Of the
    larger side, only as many images count as the smaller has: the first.
    """
    count = min(len(held_out), len(trained))
    others, own = (
        sorted(math.inf if math.isnan(loss) else loss for loss in side[:count]) for side in (held_out, trained)
    )
    return max(0, *(bisect_right(own, loss) - bisect_right(others, loss) for loss in own)) / count


def chance(advantage: float, *, images: int) -> float:
    """Return the probability of at least such an advantage, of so many images on each side, where there is none.

    Then all orders of the losses are equally likely, and C(2n, n - k) of C(2n, n) have an advantage of k / n or more
    (Gnedenko and Korolyuk 1951, by the reflection principle): 1 in 3432 for complete separation of 7 and 7 images, and
    no less than 1 in 924 with fewer.
    """
    told = round(advantage * images)
    both = math.lgamma(images - told + 1) + math.lgamma(images + told + 1)
    return math.exp(2 * math.lgamma(images + 1) - both)


def hint(evaluations: Sequence[Evaluation]) -> str:
    """Return what a user should know of the newest evaluation, "" where there is nothing.

    Images are being memorised where the advantage is at least one half, so that who sees nothing but losses would be
    right three times out of four, and would be that high by chance at most once in a thousand times: 11 of 16 images,
    all of 7, never fewer than 7. Otherwise the training overfits where the held-out loss lies 5 % above its lowest so
    far (generalisation loss, Prechelt 1998, "Early stopping, but when?", class GL with alpha 5) while that of the
    training images still falls.
    """
    newest = evaluations[-1] if evaluations else None
    if newest is None or newest.train_loss is None:
        return ""
    told, by_chance = newest.advantage or 0, 1 if newest.chance is None else newest.chance
    if told >= ADVANTAGE and by_chance <= CHANCE:
        return (
            f"step {newest.step}: training images are being memorised: their loss is {newest.train_loss:.4g}, that of "
            f"held-out images {newest.loss:.4g} (membership advantage {told:.2f}); stop earlier, lower the "
            "rank or learning rate, or add images"
        )
    lowest = best(evaluations)
    if lowest is not None and newest.loss > (1 + GENERALISATION_LOSS) * lowest.loss:
        before = next((one.train_loss for one in evaluations if one.step == lowest.step), None)
        if before is not None and newest.train_loss < before:
            return (
                f"step {newest.step}: overfitting: the held-out loss is {newest.loss / lowest.loss - 1:.0%} above that "
                f"of step {lowest.step}, while that of training images falls; set validation.earlyStopping"
            )
    return ""


def warning(evaluations: Sequence[Evaluation]) -> str:
    """Return the hint as it was first given, while there is one: a warning is told once, with the step it began at."""
    if not hint(evaluations):
        return ""
    return next(text for count in range(1, len(evaluations) + 1) if (text := hint(evaluations[:count])))
