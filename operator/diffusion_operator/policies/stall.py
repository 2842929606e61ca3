"""`runPolicy.stallSeconds`, the second line: the trainer's own watchdog ends a hung process long before this does.

It is for what no process can do about itself: one that is frozen, or whose watchdog hangs too.
"""

from __future__ import annotations

from diffusion_api.outcomes import OF_CAUSE, Cause
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.policies.stopping import being_stopped, stop
from diffusion_operator.state import Case, Decision
from diffusion_operator.status import duration

MARGIN_SECONDS = 180
"""How much later than the trainer's own watchdog, which needs a minute more where even its thread cannot run."""


def hangs(case: Case) -> Decision | None:
    """Delete the pods of an attempt that shows no sign of life; it ends with cause Hang and backs off."""
    why = being_stopped(case, Cause.HANG) or _hung(case)
    return None if why is None else stop(case, why, rule="stall")


def _hung(case: Case) -> Ending | None:
    attempt = case.job.open_attempt
    pods = case.pods_of(attempt.number) if attempt else ()
    if attempt is None or not pods or any(pod.phase != "Running" or pod.deleting or pod.gone for pod in pods):
        return None
    heard = case.seen.heard
    still, what = 0.0, ""
    if heard.silent_since is not None:
        # One that never answered may just be out of the operator's reach: nothing is known of it. And where most do not
        # answer, the operator is the one that is cut off.
        spoke = (heard.report is not None or attempt.reached_step is not None) and not heard.others_silent
        still = (case.now - heard.silent_since).total_seconds() if spoke else 0.0
        what = f"the trainer does not answer any more ({heard.error})"
    elif heard.report is not None and heard.report.idle_seconds is not None:
        still, what = heard.report.idle_seconds, "the training stands still, and its watchdog has not ended it"
    if still < case.spec.run_policy.stall_seconds + MARGIN_SECONDS:
        return None
    outcome = OF_CAUSE[Cause.HANG]
    return Ending(cause=outcome.cause, message=f"{what}, for {duration(still)}: {outcome.remedy}")
