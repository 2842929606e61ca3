"""`runPolicy.ttlSecondsAfterFinished`: a finished job is deleted, and with it, by garbage collection, its pods.

The time counts from the transition of Complete or Failed, which stands in the status: a restart does not prolong it.
"""

from __future__ import annotations

from diffusion_operator import timestamps
from diffusion_operator.policies.leftovers import leftovers
from diffusion_operator.state import Case, Decision

RULE = "ttl"


def has_outlived_itself(case: Case) -> Decision | None:
    """Delete the job when it is time; until then come back for it, since nothing else would."""
    ttl = _ttl(case)
    if ttl is None or not case.job.finished or "deletionTimestamp" in case.job.metadata:
        return None
    ends = (condition for kind in ("Complete", "Failed") if (condition := case.job.condition(kind)) is not None)
    finished_at = min(timestamps.from_text(end.last_transition_time) for end in ends if end.status == "True")
    left = ttl - (case.now - finished_at).total_seconds()
    if left > 0:
        return Decision(rule=RULE, delete=leftovers(case, of_all=True), again_seconds=left)
    return Decision(rule=RULE, delete_job=True)


def _ttl(case: Case) -> int | None:
    """Return the field as it stands there: a job that ran is deleted though a newer version may not understand it."""
    spec = case.job.raw.get("spec") or {}
    found = (spec.get("runPolicy") or {}).get("ttlSecondsAfterFinished")
    return found if isinstance(found, int) else None
