"""`resources.failoverSeconds`: how long an attempt waits for nodes of one choice before the next is tried."""

from __future__ import annotations

from datetime import datetime, timedelta

from diffusion_api.outcomes import OF_CAUSE, Cause
from diffusion_api.waiting import WaitingCause
from diffusion_operator import timestamps
from diffusion_operator.policies.choices import Choice, current, ladder, passed_over_until
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.policies.pending import why_waiting
from diffusion_operator.policies.stopping import being_stopped, stop
from diffusion_operator.policies.waiting.facts import Diagnosis
from diffusion_operator.state import Case, Decision
from diffusion_operator.status import duration

IMPOSSIBLE_SECONDS = 60
"""Where nothing that is there can take the pods, an autoscaler has said by then whether it will bring something."""

_C = WaitingCause
IMPOSSIBLE = frozenset(
    {
        _C.NO_SUCH_NODE,
        _C.TAINT_OR_SELECTOR_MISMATCH,
        _C.SPOT_UNAVAILABLE,
        _C.CAPACITY_UNAVAILABLE,
        _C.AUTOSCALER_REFUSED,
        _C.EXCEEDS_MAX_QUOTA,
        _C.NO_MATCHING_FLAVOR,
    }
)
"""Waiting longer is no use."""
BUSY = frozenset(
    {
        _C.INSUFFICIENT_GPU,
        _C.FRAGMENTED,
        _C.INSUFFICIENT_CPU_OR_MEMORY,
        _C.NODE_CORDONED,
        _C.NODE_NOT_READY,
        _C.GANG_INCOMPLETE,
        _C.UNKNOWN,
    }
)
"""May pass. All other causes do not move a job: a node is on its way, a queue has it in line, or it is not about
nodes."""


def moves_on(case: Case) -> Decision | None:
    """Stop an attempt whose pods have found no node in time; its end, cause NoCapacity, opens the next choice."""
    why = being_stopped(case, Cause.NO_CAPACITY)
    if why is None:
        left = seconds_left(case)
        if left is None or left > 0:
            return None
        why = _ending(case)
    return stop(case, why, rule="failover")


def seconds_left(case: Case) -> float | None:
    """Return when the next choice is due if nothing else happens; None where there is nothing to move from or to.

    Later than the patience with this choice may be the moment at which another one is no longer passed over.
    """
    why = _waits(case)
    if why is None:
        return None
    others = [choice for choice in ladder(case) if choice != current(case, case.status)]
    attempt = case.status.attempts[0]
    patience = timestamps.from_text(attempt.started_at) + timedelta(seconds=_patience(case, why))
    due = min((max(patience, _free_at(case, choice)) for choice in others), default=None)
    return (due - case.now).total_seconds() if due is not None else None


def _waits(case: Case) -> Diagnosis | None:
    """Return why pods of the open attempt have no node, where that may be another one's gain."""
    attempt = case.job.open_attempt
    if attempt is None or len(ladder(case)) == 1:
        return None
    pods = case.pods_of(attempt.number)
    if not any(pod.phase == "Pending" and not pod.node and not pod.gone and not pod.deleting for pod in pods):
        return None
    found = why_waiting(case, pods)
    return found if found is not None and found.cause in IMPOSSIBLE | BUSY else None


def _patience(case: Case, why: Diagnosis) -> int:
    given = case.spec.resources.failover_seconds
    return min(given, IMPOSSIBLE_SECONDS) if why.cause in IMPOSSIBLE else given


def _free_at(case: Case, choice: Choice) -> datetime:
    """Return from when on the choice is not passed over."""
    return passed_over_until(case.status, choice) or case.now


def _ending(case: Case) -> Ending:
    outcome, why = OF_CAUSE[Cause.NO_CAPACITY], _waits(case)
    waited = case.now - timestamps.from_text(case.status.attempts[0].started_at)
    said = f"{why.cause}: {why.detail}" if why is not None else outcome.explanation
    return Ending(cause=outcome.cause, message=f"no node within {duration(waited.total_seconds())}; {said}")
