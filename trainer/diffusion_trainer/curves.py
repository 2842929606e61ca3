"""The curves of a run: loss, learning rate and gradient norm of every step, and every evaluation.

They are part of the checkpoint. So a resumed run continues them from exactly its step, with none missing or twice, and
`metrics.jsonl` is only their text: object stores cannot append, and need not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("step", "loss", "learning_rate", "grad_norm")


@dataclass(frozen=True, slots=True)
class Point:
    """One optimizer step: the loss of its batch, the learning rate of its update, the norm before clipping."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float

    @property
    def skipped(self) -> bool:
        """Return whether the step changed nothing, for it had no numbers."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss on the held-out images after `step`, overall and by range of timesteps (low noise first).

    `train_loss` is the same measure on as many training images; `advantage` and `chance` are what `overfitting` makes
    of the losses of the single images. None where there are no training images.
    """

    step: int
    loss: float
    by_bin: tuple[float, ...] = ()
    train_loss: float | None = None
    advantage: float | None = None
    chance: float | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """What CLIP says of pictures drawn after `step`; None where there was nothing to score or compare."""

    step: int
    clip_score: float | None = None
    kid: float | None = None

    def named(self) -> dict[str, float]:
        """Return the scores that there are, by their names."""
        both = {"clip_score": self.clip_score, "kid": self.kid}
        return {name: value for name, value in both.items() if value is not None}


@dataclass(slots=True)
class Curves:
    """What is known, in the order of the steps, and what still lies on the device.

    `evaluated` is the step of the last evaluation, which has no loss where no images are held out.
    """

    points: list[Point] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    evaluated: int = 0
    scores: list[Scored] = field(default_factory=list)
    _waiting: list[tuple[int, Tensor, float, Tensor]] = field(default_factory=list)

    def note(self, step: int, *, loss: Tensor, learning_rate: float, grad_norm: Tensor) -> None:
        """Take note of a step without waiting for the device: `loss` and `grad_norm` are scalars on it."""
        self._waiting.append((step, loss, learning_rate, grad_norm))

    def evaluate(self, step: int, found: Evaluation | None, scored: Scored | None = None) -> None:
        """Take note of the evaluation after `step`, which may be done again but is there once."""
        if found is not None:
            self.evaluations = [one for one in self.evaluations if one.step != step] + [found]
        if scored is not None:
            self.scores = [one for one in self.scores if one.step != step] + [scored]
        self.evaluated = step

    def settle(self) -> list[Point]:
        """Return the steps noted since the last call, now as numbers. A synchronisation with the device."""
        if not self._waiting:
            return []
        values = torch.stack([torch.stack([loss, norm]).double() for _, loss, _, norm in self._waiting]).tolist()
        fresh = [
            Point(step, loss, learning_rate, norm)
            for (step, _, learning_rate, _), (loss, norm) in zip(self._waiting, values, strict=True)
        ]
        self._waiting.clear()
        self.points += fresh
        return fresh

    def since(self, step: int) -> Sequence[Point]:
        """Return the settled points after `step`; every step has one, so they are counted from the end."""
        return self.points[len(self.points) - (self.points[-1].step - step) :] if self.points else []

    def tensors(self) -> dict[str, Tensor]:
        """Return the settled points as one fp64 tensor [steps, columns]."""
        rows = [(p.step, p.loss, p.learning_rate, p.grad_norm) for p in self.points]
        return {"points": torch.tensor(rows, dtype=torch.float64).view(-1, len(COLUMNS))}

    def scalars(self) -> dict[str, Any]:
        """Return the evaluations in JSON's types."""
        return {
            "evaluated": self.evaluated,
            "evaluations": [
                [e.step, e.loss, list(e.by_bin), e.train_loss, e.advantage, e.chance] for e in self.evaluations
            ],
            "scores": [[one.step, one.clip_score, one.kid] for one in self.scores],
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], scalars: Any) -> Curves:
        """Return what `tensors` and `scalars` gave."""
        points = [Point(int(step), *rest) for step, *rest in tensors["points"].tolist()]
        evaluations = [
            Evaluation(step, loss, tuple(by_bin), *rest) for step, loss, by_bin, *rest in scalars["evaluations"]
        ]
        scores = [Scored(*one) for one in scalars.get("scores", ())]  # older checkpoints have none
        return cls(points, evaluations, scalars["evaluated"], scores)

    def to_jsonl(self) -> bytes:
        """Return metrics.jsonl: one line per step, with the evaluation after it; what is not finite is null."""
        after = {e.step: e for e in self.evaluations}
        scored = {one.step: one for one in self.scores}
        lines = []
        for p in self.points:
            line: dict[str, Any] = {
                "step": p.step,
                "loss": _finite(p.loss),
                "learning_rate": p.learning_rate,
                "grad_norm": _finite(p.grad_norm),
            }
            if evaluation := after.get(p.step):
                line["validation_loss"] = _finite(evaluation.loss)
                line["validation_loss_by_bin"] = [_finite(value) for value in evaluation.by_bin]
                if evaluation.train_loss is not None:
                    line["train_subset_loss"] = _finite(evaluation.train_loss)
            if scores := scored.get(p.step):
                line |= {name: _finite(value) for name, value in scores.named().items()}
            lines.append(json.dumps(line) + "\n")
        return "".join(lines).encode()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
