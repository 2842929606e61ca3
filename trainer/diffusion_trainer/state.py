"""The state of a run between two optimizer steps: everything that the next step depends on besides the spec.

Weights, the optimizer's state, the step, and the curves so far. No random generator, sampler, scheduler or loader
position: all of these are functions of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_trainer.checkpoint import Snapshot
from diffusion_trainer.curves import Curves
from diffusion_trainer.errors import BadData, CheckpointUnsupported
from diffusion_trainer.optim import OptimizerState, load_optimizer, optimizer_state


@dataclass(frozen=True)
class Basis:
    """What the weights were trained from: the hash of the dataset lock, and of each file of the base model."""

    dataset: str
    model: Mapping[str, str]


@dataclass(frozen=True)
class Trained:
    """What training changes, in place: parameters by their stable names, and their optimizer."""

    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    @property
    def bytes(self) -> int:
        """Return the size of the state: weights and two moments."""
        return 3 * sum(p.numel() * p.element_size() for p in self.parameters.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights without their history."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


def snapshot(step: int, trained: Trained, *, curves: Curves, basis: Basis) -> Snapshot:
    """Return the state after `step` steps; its tensors are the live ones, for the publisher to copy.

    Raises ValueError when the curves are not settled up to that step: a resumed run would miss some of them.
    """
    known = curves.points[-1].step if curves.points else 0
    if known != step:
        raise ValueError(f"snapshot of step {step}: the curves are settled up to step {known}")
    optimizer = optimizer_state(trained.optimizer, trained.parameters)
    return Snapshot(
        step=step,
        tensors={
            "model": trained.weights(),
            "optimizer": optimizer.tensors,
            "curves": curves.tensors(),
        },
        scalars={
            "curves": curves.scalars(),
            "optimizer": dict(optimizer.scalars),
            "dataset": basis.dataset,
            "model": dict(basis.model),
        },
    )


def restore(found: Snapshot, trained: Trained, *, basis: Basis) -> Curves:
    """Put a snapshot back and return its curves.

    Raises:
        BadData: the base model or the dataset is not what the snapshot was trained from.
        CheckpointUnsupported: it holds other parameters than the run has.

    """
    _check_basis(found.scalars, basis)
    weights = found.tensors["model"]
    expected = {name: tuple(p.shape) for name, p in trained.parameters.items()}
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != expected:
        raise CheckpointUnsupported(
            f"the checkpoint of step {found.step} holds other parameters than this trainer makes from the same spec; "
            "resume with the image that wrote it, or create the job again under a new name"
        )
    with torch.no_grad():
        for name, parameter in trained.parameters.items():
            parameter.copy_(weights[name])
    scalars: Any = found.scalars["optimizer"]
    load_optimizer(trained.optimizer, trained.parameters, OptimizerState(found.tensors["optimizer"], scalars))
    return Curves.restored(found.tensors["curves"], found.scalars["curves"])


def _check_basis(scalars: Mapping[str, Any], basis: Basis) -> None:
    if scalars["model"] != dict(basis.model):
        raise BadData(
            "model.source: its files are not those that the run began with; put them back, or create the job again "
            "under a new name"
        )
    if scalars["dataset"] != basis.dataset:
        raise BadData(
            "dataset.source: its lock beside the checkpoints is not the one that the run began with; put it back, or "
            "create the job again under a new name"
        )
