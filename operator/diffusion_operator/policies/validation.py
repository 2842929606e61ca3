"""A spec that cannot be run."""

from __future__ import annotations

from diffusion_api.status import JobStatus
from diffusion_operator import timestamps
from diffusion_operator.policies.accounting import account
from diffusion_operator.state import Case, Decision
from diffusion_operator.status import set_condition, set_pending, short

HINT = "change the named fields; where they cannot be changed, delete the job and create it anew"


def is_invalid(case: Case) -> Decision | None:
    """Say what is wrong, and wait: only a change of the spec heals it. Pods that run already are left running."""
    if case.job.spec is not None:
        return None
    return Decision(
        rule="validation", status=refused(case, reason="InvalidSpec", problems=case.job.problems, hint=HINT)
    )


def refused(case: Case, *, reason: str, problems: tuple[str, ...], hint: str, remedy: str = "") -> JobStatus:
    """Return the status of a job that is not started because something about it is wrong.

    `remedy` belongs to the condition's message where the problems do not say it themselves.
    """
    detail = short("; ".join(problems))
    message = short(f"{detail}: {remedy}") if remedy else detail
    status = case.status.model_copy(update={"observed_generation": case.job.generation, "message": message})
    if case.job.open_attempt is None:
        status = status.model_copy(update={"phase": "Pending"})
    status = set_pending(status, cause=reason, detail=detail, hint=hint, now=case.now)
    return set_condition(
        status, "Validated", "False", reason=reason, message=message, generation=case.job.generation, now=case.now
    )


def accepted(case: Case) -> JobStatus:
    """Return the status of a job that passed validation: the base of every later policy's answer."""
    start = case.status.start_time or (None if case.spec.suspend else timestamps.to_text(case.now))
    status = case.status.model_copy(
        update={
            "observed_generation": case.job.generation,
            "gpus": case.gpus,
            "pending": None,
            "message": "",
            "start_time": start,
        }
    )
    status = account(case, status)
    return set_condition(
        status,
        "Validated",
        "True",
        reason="Valid",
        message="the job can be run",
        generation=case.job.generation,
        now=case.now,
    )
