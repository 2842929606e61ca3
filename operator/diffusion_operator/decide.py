"""What is to be done about a job. The order of `POLICIES` is the specification of the operator."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from diffusion_operator.policies.attempt_ended import attempt_ended
from diffusion_operator.policies.attempt_runs import attempt_runs
from diffusion_operator.policies.attempt_starts import attempt_starts
from diffusion_operator.policies.deletion import is_being_deleted
from diffusion_operator.policies.finished import stays_finished
from diffusion_operator.policies.managed_by import is_somebody_elses
from diffusion_operator.policies.preflight import preflight_first
from diffusion_operator.policies.resources import profile_refuses
from diffusion_operator.policies.run_policy import backs_off
from diffusion_operator.policies.suspend import is_suspended
from diffusion_operator.policies.validation import is_invalid
from diffusion_operator.state import Case, Decision, Job, Observed

Policy = Callable[[Case], Decision | None]

POLICIES: tuple[Policy, ...] = (  # the first answer wins
    is_somebody_elses,  # another controller's: hands off
    stays_finished,  # Complete and Failed are for ever
    is_being_deleted,  # start nothing; pods go with their owner
    is_invalid,  # Validated=False until the spec changes
    profile_refuses,  # Validated=False until the profile or the spec changes; not after the first attempt
    is_suspended,  # stop after a checkpoint, start nothing
    attempt_ended,  # evidence -> cause -> complete, fail, go on at once, or back off
    attempt_runs,  # create missing pods, say why they wait or how far they are
    backs_off,  # not yet
    preflight_first,  # before the first attempt: a pod without a GPU looks at everything that the job names
    attempt_starts,  # the number first, then the pods
)


def decide(job: Job, seen: Observed, *, now: datetime, status_seconds: float = 15) -> Decision:
    """Return what is to be done. Pure: equal arguments give equal answers."""
    case = Case(job=job, seen=seen, now=now, status_seconds=status_seconds)
    for policy in POLICIES:
        decision = policy(case)
        if decision is not None:
            return decision
    raise AssertionError("the last policy always answers")
