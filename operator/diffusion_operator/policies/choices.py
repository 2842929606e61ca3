"""`spec.resources` as a ladder of choices, each a profile and one capacity: which of them the next attempt uses.

The first one that has not been given up lately. It is given up for `PASSED_OVER` when no node came for an attempt
(`failover`), or when spot nodes were taken away again and again. So a running attempt is never moved, and each new one
begins with what the user prefers. docs/decisions/0006-alternatives.md says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from diffusion_api.memory import SMALLEST, largest_micro_batch
from diffusion_api.memory_table import NETWORKS, Architecture
from diffusion_api.outcomes import Cause
from diffusion_api.resources import Capacity, NodeCapacity, Resources
from diffusion_api.status import Attempt, JobStatus, Placement, UnavailableChoice
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator import timestamps
from diffusion_operator.state import Case
from diffusion_operator.status import short

PASSED_OVER = timedelta(minutes=30)
"""For how long a choice that was given up is passed over."""
PREEMPTIONS = 3
"""So many endings by preemption within `OFTEN` make spot nodes of a kind not worth another try for a while."""
OFTEN = timedelta(hours=1)
_TAKEN = {Cause.PREEMPTED, Cause.NODE_LOST}

Reason = Literal["First", "NoCapacity", "Preempted", "Again"]


@dataclass(frozen=True)
class Choice:
    """One thing that the user would have the job run on."""

    profile: str
    capacity: NodeCapacity

    def __str__(self) -> str:
        """Return it as it is named in sentences."""
        return f"{self.profile} {self.capacity}"


def ladder(case: Case) -> tuple[Choice, ...]:
    """Return all choices in order, without repetition. Any is Spot, where the profile has it, and then OnDemand."""
    found: dict[Choice, None] = {}
    for profile, capacity in asked(case.spec.resources):
        if capacity == "Any":
            if case.offered(profile).spot is not None:
                found[Choice(profile, "Spot")] = None
            found[Choice(profile, "OnDemand")] = None
        else:
            found[Choice(profile, capacity)] = None
    return tuple(found)


def asked(resources: Resources) -> tuple[tuple[str, Capacity], ...]:
    """Return (profile, capacity) as the user wrote them, the first choice first."""
    return (
        (resources.profile, resources.capacity),
        *((alternative.profile, alternative.capacity) for alternative in resources.alternatives),
    )


def current(case: Case, status: JobStatus) -> Choice:
    """Return the choice that is in use by that status of the job; the first before the first attempt."""
    placement = status.placement
    return Choice(placement.profile, placement.capacity) if placement is not None else ladder(case)[0]


def passed_over_until(status: JobStatus, choice: Choice) -> datetime | None:
    """Return until when the choice is passed over; None where it was not given up lately."""
    ends = [timestamps.from_text(entry.until) for entry in status.unavailable if _is(entry, choice)]
    return max(ends, default=None)


def placed(case: Case, status: JobStatus) -> JobStatus:
    """Return the status with the choice of the attempt that starts now; its newest attempt is the one before."""
    status = status.model_copy(update={"unavailable": _given_up(case, status)})
    if status.profiles is None:
        status = status.model_copy(update={"profiles": _snapshots(case)})
    choices, now = ladder(case), timestamps.to_text(case.now)
    # Where all are passed over: the one that is so for the shortest time, in the user's order.
    choice = min(choices, key=lambda choice: passed_over_until(status, choice) or case.now)
    old = status.placement
    waited = bool(status.attempts) and status.attempts[0].cause == Cause.NO_CAPACITY
    waits_since = old.waits_since if old is not None and waited else now
    if old is not None and _is(old, choice):
        return status.model_copy(update={"placement": old.model_copy(update={"waits_since": waits_since})})
    reason, message = _why(status, choice, choices)
    other_gpu = old is None or old.profile != choice.profile
    placement = Placement(
        profile=choice.profile,
        capacity=choice.capacity,
        since=now,
        waits_since=waits_since,
        reason=reason,
        message=short(message),
        retunes=0 if other_gpu or old is None else old.retunes,
    )
    if other_gpu and old is not None:
        bound = _micro_batch(case, status, before=case.offered(old.profile), after=case.offered(choice.profile))
        status = status.model_copy(update={"micro_batch_size": bound})
    return status.model_copy(update={"placement": placement})


def _is(entry: Placement | UnavailableChoice | Attempt, choice: Choice) -> bool:
    return (entry.profile, entry.capacity) == (choice.profile, choice.capacity)


def _given_up(case: Case, status: JobStatus) -> tuple[UnavailableChoice, ...]:
    """Return the choices to pass over, with the one of the newest attempt where its end says so."""
    kept = {
        (entry.profile, entry.capacity): entry
        for entry in status.unavailable
        if timestamps.from_text(entry.until) > case.now
    }
    newest = status.attempts[0] if status.attempts else None
    if newest is None or newest.ended_at is None or status.placement is None or len(ladder(case)) == 1:
        return tuple(kept.values())
    choice = current(case, status)
    until = timestamps.from_text(newest.ended_at) + PASSED_OVER
    often = choice.capacity == "Spot" and _times_taken(status, choice, case.now) >= PREEMPTIONS
    reason = "NoCapacity" if newest.cause == Cause.NO_CAPACITY else "Preempted" if often else ""
    if reason and until > case.now:
        kept[choice.profile, choice.capacity] = UnavailableChoice(
            profile=choice.profile, capacity=choice.capacity, until=timestamps.to_text(until), reason=reason
        )
    return tuple(kept.values())


def _times_taken(status: JobStatus, choice: Choice, now: datetime) -> int:
    """Return how often nodes of the choice were taken away lately; 0 where the newest attempt ended otherwise."""
    if status.attempts[0].cause not in _TAKEN:
        return 0
    taken = [attempt for attempt in status.attempts if attempt.cause in _TAKEN and _is(attempt, choice)]
    ends = [timestamps.from_text(attempt.ended_at) for attempt in taken if attempt.ended_at is not None]
    return sum(now - end <= OFTEN for end in ends)


def _why(status: JobStatus, choice: Choice, choices: tuple[Choice, ...]) -> tuple[Reason, str]:
    number = f"choice {choices.index(choice) + 1} of {len(choices)}: {choice}"
    old = status.placement
    if old is None:
        return "First", number
    left = Choice(old.profile, old.capacity)
    reason = next((entry.reason for entry in status.unavailable if _is(entry, left)), "")
    if reason == "NoCapacity":
        newest = status.attempts[0]
        words = newest.message if newest.cause == Cause.NO_CAPACITY else "it had no nodes lately"
        return "NoCapacity", f"{number}, after {left}: {words}"
    if reason == "Preempted":
        return "Preempted", f"{number}, after {left}: its nodes were taken away {PREEMPTIONS} times within an hour"
    return "Again", f"{number} is tried again"


def _snapshots(case: Case) -> dict[str, dict[str, object]]:
    """Return the profiles of all choices, without words for people: the status is small."""
    names = dict.fromkeys(profile for profile, _ in asked(case.spec.resources))
    words = {"display_name": "", "description": ""}
    return {name: case.offered(name).model_copy(update=words).to_json_object() for name in names}


def _micro_batch(case: Case, status: JobStatus, *, before: ProfileSpec, after: ProfileSpec) -> int | None:
    """Return the bound on the micro-batch on another GPU; None lets the trainer begin with the largest.

    What did not fit into a GPU does not fit into a smaller one, and says nothing of a larger one. The estimate knows
    more, where the network is known.
    """
    had, has = before.gpu_memory_gib, after.gpu_memory_gib
    if had is None or has is None:
        return None
    if has >= had:
        return status.micro_batch_size if has == had else None
    found = status.architecture or SMALLEST.get(case.spec.model.family)
    family: Architecture | None = next((name for name in NETWORKS if name == found), None)
    fits = max(1, largest_micro_batch(case.spec, family, has)) if family is not None else None
    return min((bound for bound in (status.micro_batch_size, fits) if bound is not None), default=None)


def retuned(status: JobStatus, micro_batch_size: int) -> JobStatus:
    """Return the status with a new bound on the micro-batch, found on the GPU in use."""
    placement = status.placement
    if placement is not None:
        placement = placement.model_copy(update={"retunes": placement.retunes + 1})
    return status.model_copy(update={"micro_batch_size": micro_batch_size, "placement": placement})


def without_earlier_waits(status: JobStatus) -> JobStatus:
    """Return the status without attempts that ran nowhere just before the newest, which ran nowhere either.

    A job that waits long goes around its choices again and again; what it has really been through is worth more room.
    """
    newest, *older = status.attempts
    while older and older[0].cause == Cause.NO_CAPACITY:
        older.pop(0)
    return status.model_copy(update={"attempts": (newest, *older)})
