"""What a diagnosis is made from, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from diffusion_api.waiting import WaitingCause
from diffusion_api.waiting_table import hint

MAX_TEXT = 1024
"""Most characters of detail and of hint, as in the status."""


@dataclass(frozen=True, kw_only=True)
class WaitingFacts:
    """Everything that may tell why pods wait. Objects are raw JSON; whatever is missing narrows the diagnosis only."""

    namespace: str = "<namespace>"
    """The job's."""
    pods: tuple[Any, ...] = ()
    """The job's pods of the open attempt."""
    wanted: int = 1
    """How many pods the attempt has in all."""
    profile: str = ""
    """Name of the job's profile."""
    resource: str | None = None
    """The profile's resource name, e.g. nvidia.com/gpu; None without GPUs."""
    capacity: str = "OnDemand"
    """The job's `resources.capacity`."""
    refusal: str = ""
    """What the API server said when it refused to create a pod; empty where it did not."""
    events: tuple[Any, ...] = ()
    """Events about the pods and about NodeClaims; others do no harm."""
    nodes: tuple[Any, ...] | None = None
    """All nodes; None where they are not known."""
    others: tuple[Any, ...] | None = None
    """Pods of others that have a node and have not ended; None where they are not known."""
    job_ends: Mapping[str, datetime] = field(default_factory=dict)
    """When other jobs are expected to end, by `namespace/name`."""
    workload: Any = None
    """The Kueue Workload of the pods."""
    queue_position: int | None = None
    """The job's place among those that wait in its LocalQueue, from 0."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Why it waits."""

    cause: WaitingCause
    detail: str
    """What was seen."""
    hint: str
    """What can be done."""


def diagnosis(cause: WaitingCause, detail: str, variant: str = "", **found: str) -> Diagnosis:
    """Return the diagnosis with the table's hint, both texts bounded."""
    return Diagnosis(cause=cause, detail=_short(detail), hint=_short(hint(cause, variant, **found)))


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_TEXT else flat[: MAX_TEXT - 3] + "..."
