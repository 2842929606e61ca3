"""`spec.suspend`: stop after a checkpoint, and go on later as if nothing had been."""

from __future__ import annotations

from diffusion_api.outcomes import Action
from diffusion_api.status import JobStatus
from diffusion_operator.policies import attempt_ended
from diffusion_operator.policies.attempt_ended import SUSPENDING
from diffusion_operator.policies.leftovers import leftovers
from diffusion_operator.policies.validation import accepted
from diffusion_operator.state import Case, Decision
from diffusion_operator.status import Value, set_condition

MESSAGE = "spec.suspend is true; set it to false to go on"


def is_suspended(case: Case) -> Decision | None:
    """Stop the pods (SIGTERM, so that they save), close their attempt, and start none."""
    if not case.spec.suspend:
        return None
    attempt = case.job.open_attempt
    if attempt is None:
        return _suspended(case, accepted(case))
    pods = case.pods_of(attempt.number)
    running = tuple(pod for pod in pods if pod.live(case.now))
    if running:
        message = f"attempt {attempt.number} saves and stops because spec.suspend is true"
        status = accepted(case).model_copy(update={"phase": "Interrupted", "message": message})
        # No longer starting: pods that go now are not to be created again.
        for kind, reason in {"Suspended": SUSPENDING, "PodsReady": "Stopping"}.items():
            status = set_condition(
                status, kind, "False", reason=reason, message=message, generation=case.job.generation, now=case.now
            )
        again = attempt_ended.seconds_to_stuck(running, case)
        stopping = tuple(pod for pod in running if not pod.deleting)
        return Decision(rule="suspend", status=status, delete=stopping, again_seconds=again)
    status, verdict = attempt_ended.close(case)
    if verdict.action in {Action.SUCCEED, Action.FAIL}:
        return Decision(rule="suspend", status=attempt_ended.finish(case, status, verdict))
    return _suspended(case, status)


def _suspended(case: Case, status: JobStatus) -> Decision:
    changes = {"phase": "Suspended", "message": MESSAGE, "next_attempt_at": None, "start_time": None, "workload": None}
    status = status.model_copy(update=changes)
    said: dict[str, Value] = {"Suspended": "True", "Progressing": "False"}
    for kind, value in said.items():
        status = set_condition(
            status, kind, value, reason="Suspended", message=MESSAGE, generation=case.job.generation, now=case.now
        )
    return Decision(rule="suspend", status=status, delete=leftovers(case, of_all=True))
