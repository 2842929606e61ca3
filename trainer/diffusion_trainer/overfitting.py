"""What the curve of evaluations says: which weights are best, when to stop, whether training images are memorised.

Closed forms of the evaluations, which every checkpoint holds. So a resumed run decides what an undisturbed one decides,
and no counter has to survive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffusion_api.validation import EarlyStopping
from diffusion_trainer.curves import Evaluation

METRIC = "validation_loss"
LEAST_IMAGES = 8
"""Images on either side below which a membership advantage is chance."""
ADVANTAGE = 0.5
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

    Membership advantage of the adversary that says "trained on" where the loss is below the training images' mean:
    its true positives less its false positives (Yeom et al. 2018, arXiv 1709.01604, definition 4 and adversary 1; for
    diffusion models: Carlini et al. 2023, arXiv 2301.13188, section 5.1).
    """
    threshold = sum(trained) / len(trained)
    told = [sum(loss < threshold for loss in losses) / len(losses) for losses in (trained, held_out)]
    return told[0] - told[1]


def hint(evaluations: Sequence[Evaluation]) -> str:
    """Return what a user should know of the newest evaluation, "" where there is nothing.

    Images are being memorised where the advantage is at least one half: who sees nothing but losses would be right
    three times out of four. With fewer than `LEAST_IMAGES` images on a side that is chance, and the training
    overfits where the held-out loss lies 5 % above its lowest so far (generalisation loss, Prechelt 1998, "Early
    stopping, but when?", class GL with alpha 5) while that of the training images still falls.
    """
    newest = evaluations[-1] if evaluations else None
    if newest is None or newest.train_loss is None:
        return ""
    if newest.advantage is not None and newest.advantage >= ADVANTAGE:
        return (
            f"step {newest.step}: training images are being memorised: their loss is {newest.train_loss:.4g}, that of "
            f"held-out images {newest.loss:.4g} (membership advantage {newest.advantage:.2f}); stop earlier, lower the "
            "rank or learning rate, or add images"
        )
    lowest = best(evaluations)
    if newest.advantage is None and lowest is not None and newest.loss > (1 + GENERALISATION_LOSS) * lowest.loss:
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
