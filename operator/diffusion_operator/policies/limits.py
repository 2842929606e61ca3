"""The bounds of the whole run: what happens at each is the same, when it is reached is in a file of its own."""

from __future__ import annotations

from collections.abc import Callable

from diffusion_api.outcomes import Action, Cause
from diffusion_operator.policies import active_deadline, gpu_hours, pending_deadline
from diffusion_operator.policies.attempt_ended import finish
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.policies.leftovers import leftovers
from diffusion_operator.policies.run_policy import Verdict
from diffusion_operator.policies.stopping import being_stopped, stop
from diffusion_operator.policies.validation import accepted
from diffusion_operator.state import Case, Decision

LIMITS: tuple[tuple[Callable[[Case], float | None], Callable[[Case], Ending]], ...] = (
    (active_deadline.seconds_left, active_deadline.ending),
    (gpu_hours.seconds_left, gpu_hours.ending),
    (pending_deadline.seconds_left, pending_deadline.ending),
)
CAUSES = (Cause.DEADLINE_EXCEEDED, Cause.GPU_HOURS_EXCEEDED, Cause.PENDING_DEADLINE_EXCEEDED)
RULE = "limits"


def limit_is_reached(case: Case) -> Decision | None:
    """Stop the pods (SIGTERM, so that they save) and fail. What an attempt says of its own end goes before."""
    why = being_stopped(case, *CAUSES) or _reached(case)
    if why is None:
        return None
    if case.job.open_attempt is not None:
        return stop(case, why, rule=RULE)
    verdict = Verdict(action=Action.FAIL, cause=why.cause, reason=str(why.cause), message=why.message)
    status = finish(case, accepted(case), verdict)
    return Decision(rule=RULE, status=status, delete=leftovers(case, of_all=True))


def seconds_to_next(case: Case) -> float | None:
    """Return when the next of the limits will be reached if nothing else happens; one that has been needs no timer."""
    left = (seconds_left(case) for seconds_left, _ in LIMITS)
    return min((seconds for seconds in left if seconds is not None and seconds > 0), default=None)


def _reached(case: Case) -> Ending | None:
    for seconds_left, ending in LIMITS:
        left = seconds_left(case)
        if left is not None and left <= 0:
            return ending(case)
    return None
