"""The state of any optimizer by the names of its parameters: tensors for tensors, numbers for numbers.

What an optimizer keeps is not listed here, it is asked: a step on a throwaway parameter of the same shape shows which
entries a checkpoint must hold, and of what shape.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_trainer.errors import CheckpointUnsupported

_SETTINGS = {"params", "lr", "lr_scale", "weight_decay"}
"""Entries of torch's parameter groups that the run sets; others that an optimizer changes are its state."""
_GROUP = "group-"

Entries = dict[str, Any]


@dataclass(frozen=True)
class OptimizerState:
    """Tensors are called `<parameter>/<entry>` or `group-<number>/<entry>`; `scalars` are of JSON's types."""

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any] = field(default_factory=dict)


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """Return the state; its tensors are the live ones. Empty before the first step.

    `untouched` among the scalars are parameters that had no gradient so far, and so have no state.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Entries] = {}
    owners = {name: optimizer.state[p] for name, p in parameters.items() if optimizer.state.get(p)}
    owners |= {f"{_GROUP}{i}": _history(group, optimizer) for i, group in enumerate(optimizer.param_groups)}
    for owner, entries in owners.items():
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}/{entry}"] = value
            elif value is None or isinstance(value, int | float):
                numbers.setdefault(owner, {})[entry] = value
            else:
                raise TypeError(f"{type(optimizer).__name__} keeps {entry} as {type(value).__name__}")
    untouched = [name for name in parameters if name not in owners]
    return OptimizerState(tensors, {"numbers": numbers, "untouched": untouched})


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: OptimizerState
) -> None:
    """Put back what `optimizer_state` returned, into an optimizer of the same parameters, whatever it has seen since.

    Raises:
        CheckpointUnsupported: entries are missing, surplus or of another shape than this optimizer's.

    """
    owners = _by_owner(state)
    untouched = set(state.scalars["untouched"])
    groups = {name: i for i, group in enumerate(optimizer.param_groups) for name in _names(group, parameters)}
    shown: dict[tuple[object, ...], Entries] = {}
    for name, parameter in parameters.items():
        kind = (groups[name], tuple(parameter.shape), parameter.dtype)
        if kind not in shown:
            shown[kind] = _entries_of(optimizer, groups[name], parameter)
        _check(name, found=owners.get(name, {}), wanted={} if name in untouched else shown[kind])
    if surplus := sorted(set(owners) - set(parameters) - {f"{_GROUP}{i}" for i in range(len(optimizer.param_groups))}):
        raise _other_optimizer(f"it holds {surplus[0]} and {len(surplus) - 1} more, which this run does not train")
    for group in optimizer.param_groups:
        for entry in _history(group, optimizer):
            if entry in optimizer.defaults:
                group[entry] = optimizer.defaults[entry]
            else:
                del group[entry]
    order = [name for group in optimizer.param_groups for name in _names(group, parameters)]
    optimizer.load_state_dict(
        {
            "state": {i: owners[name] for i, name in enumerate(order) if name not in untouched},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    for i, group in enumerate(optimizer.param_groups):
        device = group["params"][0].device
        for entry, value in owners.get(f"{_GROUP}{i}", {}).items():
            group[entry] = value.to(device) if isinstance(value, Tensor) else value


def _history(group: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Entries:
    """Return what the optimizer itself has put into a parameter group, or changed there."""
    return {
        entry: value
        for entry, value in group.items()
        if entry not in _SETTINGS and _differs(value, optimizer.defaults.get(entry))
    }


def _differs(value: object, made_with: object) -> bool:
    return isinstance(value, Tensor) or value != made_with


def _by_owner(state: OptimizerState) -> dict[str, Entries]:
    owners: dict[str, Entries] = defaultdict(dict)
    for name, tensor in state.tensors.items():
        owner, _, entry = name.rpartition("/")
        owners[owner][entry] = tensor
    for owner, entries in state.scalars["numbers"].items():
        owners[owner] |= entries
    return dict(owners)


def _names(group: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> Iterable[str]:
    """Return the names of a group's parameters in its order."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [names[id(parameter)] for parameter in group["params"]]


def _entries_of(optimizer: torch.optim.Optimizer, group: int, parameter: nn.Parameter) -> Entries:
    """Return what the optimizer keeps for a parameter, as seen at another one of the same kind."""
    stand_in = nn.Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(parameter)
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[group], "params": [stand_in]}]
    twin.step()
    return dict(twin.state[stand_in])


def _check(name: str, *, found: Entries, wanted: Entries) -> None:
    """Raise when the entries of a parameter are not those that the optimizer keeps."""
    if missing := sorted(set(wanted) - set(found)):
        raise _other_optimizer(f"it lacks {name}/{missing[0]}")
    if surplus := sorted(set(found) - set(wanted)):
        raise _other_optimizer(f"it holds {name}/{surplus[0]}, which this optimizer does not keep")
    for entry, value in wanted.items():
        if _form(found[entry]) != _form(value):
            raise _other_optimizer(f"its {name}/{entry} is {_form(found[entry])} and should be {_form(value)}")


def _form(value: object) -> object:
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else "a number"


def _other_optimizer(what: str) -> CheckpointUnsupported:
    return CheckpointUnsupported(
        f"the state of the optimizer in the checkpoint is not this trainer's: {what}; resume with the image that wrote "
        "it, or create the job again under a new name"
    )
