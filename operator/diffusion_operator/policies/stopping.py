"""An attempt that the operator itself stops: its pods are told to, they save, and the attempt ends for that reason.

The reason stands in the condition Progressing from the first moment on, so that whoever looks next, after a restart
too, does not mistake the end of the pods for a preemption. PodsReady says that they are stopped: Progressing alone may
name the same word for what a pod merely waits for.
"""

from __future__ import annotations

from diffusion_api.outcomes import Cause
from diffusion_operator.policies.attempt_ended import close, follow, seconds_to_stuck
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.policies.validation import accepted
from diffusion_operator.state import Case, Decision
from diffusion_operator.status import set_condition, short

STOPPING = "Stopping"
"""Reason of PodsReady while pods are stopped."""


def being_stopped(case: Case, *causes: Cause) -> Ending | None:
    """Return why the open attempt was told to stop, where it was for one of these causes."""
    condition, ready = case.job.condition("Progressing"), case.job.condition("PodsReady")
    if case.job.open_attempt is None or condition is None or condition.reason not in {str(cause) for cause in causes}:
        return None
    if ready is None or ready.reason != STOPPING:
        return None
    return Ending(cause=Cause(condition.reason), message=condition.message)


def stop(case: Case, why: Ending, *, rule: str) -> Decision:
    """Tell the pods of the open attempt to stop, or, when they have, close it and do what follows."""
    attempt = case.status.attempts[0]
    running = tuple(pod for pod in case.pods_of(attempt.number) if pod.live(case.now))
    if not running:
        return follow(case, *close(case, stopped_for=why), rule=rule)
    message = short(why.message)
    status = accepted(case).model_copy(update={"phase": "Interrupted", "message": short(f"{why.cause}: {message}")})
    for kind, reason in {"PodsReady": STOPPING, "Progressing": str(why.cause)}.items():
        status = set_condition(
            status, kind, "False", reason=reason, message=message, generation=case.job.generation, now=case.now
        )
    return Decision(
        rule=rule,
        status=status,
        delete=tuple(pod for pod in running if not pod.deleting),
        again_seconds=seconds_to_stuck(running, case),
    )
