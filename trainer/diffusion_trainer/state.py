"""The state of a run between two optimizer steps: everything that the next step depends on besides the spec.

Weights, the optimizer's state, the step, and the curves so far. No random generator, sampler, scheduler or loader
position: all of these are functions of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_api.training import Training
from diffusion_trainer.checkpoint import Snapshot
from diffusion_trainer.curves import Curves
from diffusion_trainer.device import Device
from diffusion_trainer.ema import Average
from diffusion_trainer.errors import BadData, CheckpointUnsupported
from diffusion_trainer.guard import Guard
from diffusion_trainer.optim import Group, LossScale, OptimizerState, load_optimizer, make_optimizer, optimizer_state


@dataclass(frozen=True)
class Basis:
    """What the weights were trained from: the hash of the dataset lock, and of each file of the base model."""

    dataset: str
    model: Mapping[str, str]


@dataclass(frozen=True)
class Trained:
    """What training changes, in place: parameters by their stable names, their optimizer, and what goes with it.

    `average` is there when the job wants one, `scale` when it computes in fp16.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    guard: Guard
    average: Average | None = None
    scale: LossScale | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that are in place, without their history."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Put what is evaluated and exported in place: the average, where there is one.

        Nothing may interrupt the entry and the exit, nor be trained in between.
        """
        if self.average is None:
            yield
        else:
            with self.average.in_place():
                yield

    def extras(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors besides weights and optimizer, by their groups in the snapshot; live ones."""
        average = {"average": self.average.tensors()} if self.average else {}
        return average | ({"scale": self.scale.tensors()} if self.scale else {})

    def restore_extras(self, found: Snapshot) -> None:
        """Put back what `extras` gave. Raises `CheckpointUnsupported`."""
        for group, tensors in self.extras().items():
            saved = found.tensors.get(group, {})
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in tensors.items()}:
                raise _other(found, f"another {group}")
        if self.average:
            self.average.restore(found.tensors["average"])
        if self.scale:
            self.scale.restore(found.tensors["scale"])


def made_trainable(groups: Sequence[Group], training: Training, *, device: Device) -> Trained:
    """Return what trains these parameters as the job says; averages begin as the weights are now."""
    parameters = dict(sorted(item for group in groups for item in group.parameters.items()))
    return Trained(
        parameters,
        make_optimizer(groups, training.optimizer),
        Guard(training.non_finite, device.torch),
        Average(parameters, decay=training.ema.decay) if training.ema.enabled else None,
        LossScale(device.torch) if device.dtype == torch.float16 else None,
    )


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
            **trained.extras(),
        },
        scalars={
            "curves": curves.scalars(),
            "optimizer": dict(optimizer.scalars),
            "roll_backs": trained.guard.roll_backs,
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
        raise _other(found, "other parameters")
    with torch.no_grad():
        for name, parameter in trained.parameters.items():
            parameter.copy_(weights[name])
    scalars: Any = found.scalars["optimizer"]
    load_optimizer(trained.optimizer, trained.parameters, OptimizerState(found.tensors["optimizer"], scalars))
    trained.restore_extras(found)
    roll_backs: Any = found.scalars["roll_backs"]
    trained.guard.resume(roll_backs)
    return Curves.restored(found.tensors["curves"], found.scalars["curves"])


def _other(found: Snapshot, what: str) -> CheckpointUnsupported:
    return CheckpointUnsupported(
        f"the checkpoint of step {found.step} holds {what} than this trainer makes from the same spec; resume with the "
        "image that wrote it, or create the job again under a new name"
    )


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
