"""`runPolicy.activeDeadlineSeconds`, as of a Kubernetes Job: from its start, or from its resumption, to its end."""

from __future__ import annotations

from diffusion_api.outcomes import OF_CAUSE, Cause
from diffusion_operator import timestamps
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.state import Case


def seconds_left(case: Case) -> float | None:
    """Return what is left of the deadline; None without one."""
    limit, start = case.spec.run_policy.active_deadline_seconds, case.status.start_time
    if limit is None or start is None:
        return None
    return limit - (case.now - timestamps.from_text(start)).total_seconds()


def ending(case: Case) -> Ending:
    """Return how the job ends at its deadline."""
    outcome = OF_CAUSE[Cause.DEADLINE_EXCEEDED]
    limit = case.spec.run_policy.active_deadline_seconds
    message = f"{outcome.explanation}, which is {limit}: {outcome.remedy}"
    return Ending(cause=outcome.cause, message=message)
