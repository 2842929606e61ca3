"""What is to be done about a job. The order of `POLICIES` is the specification of the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from diffusion_operator.policies.accounting import worth_a_write
from diffusion_operator.policies.attempt_ended import attempt_ended
from diffusion_operator.policies.attempt_runs import attempt_runs
from diffusion_operator.policies.attempt_starts import attempt_starts
from diffusion_operator.policies.deletion import is_being_deleted
from diffusion_operator.policies.departure import leaves_its_node
from diffusion_operator.policies.failover import moves_on
from diffusion_operator.policies.finished import stays_finished
from diffusion_operator.policies.limits import limit_is_reached, seconds_to_next
from diffusion_operator.policies.managed_by import is_somebody_elses
from diffusion_operator.policies.preflight import preflight_first
from diffusion_operator.policies.queueing import keep_up_with_kueue
from diffusion_operator.policies.resources import profile_refuses
from diffusion_operator.policies.run_policy import backs_off
from diffusion_operator.policies.stall import hangs
from diffusion_operator.policies.suspend import is_suspended
from diffusion_operator.policies.ttl import has_outlived_itself
from diffusion_operator.policies.vain_start import starts_in_vain
from diffusion_operator.policies.validation import is_invalid
from diffusion_operator.state import Case, Decision, Job, Observed
from diffusion_operator.status import is_finished

Policy = Callable[[Case], Decision | None]

POLICIES: tuple[Policy, ...] = (  # the first answer wins
    is_somebody_elses,  # another controller's: hands off
    has_outlived_itself,  # finished for ttlSecondsAfterFinished: the job itself is deleted
    stays_finished,  # Complete and Failed are for ever
    is_being_deleted,  # start nothing; pods go with their owner
    is_invalid,  # Validated=False until the spec changes
    profile_refuses,  # Validated=False until the profile or the spec changes; not after the first attempt
    is_suspended,  # stop after a checkpoint, start nothing
    limit_is_reached,  # deadlines and GPU-hours: stop after a checkpoint, then Failed
    hangs,  # no sign of life, and the trainer's own watchdog has not ended it: cause Hang
    starts_in_vain,  # an image or a volume that its node cannot get: give the GPUs back and back off
    leaves_its_node,  # a node that is about to go: save and go on elsewhere, before the machine is taken
    moves_on,  # no node in time: the next of the choices in spec.resources
    attempt_ended,  # evidence -> cause -> complete, fail, go on at once, or back off
    attempt_runs,  # create missing pods, say why they wait or how far they are
    backs_off,  # not yet
    preflight_first,  # before the first attempt: a pod without a GPU looks at everything that the job names
    attempt_starts,  # the number first, then the pods
)

LIMITED = POLICIES[POLICIES.index(is_suspended) + 1 :]
"""Those that answer for jobs that are under way, for which deadlines run."""

GONE_SECONDS = 5
"""When to look at a job again whose pods were deleted, if no event says before that they are gone."""


def decide(job: Job, seen: Observed, *, now: datetime, status_seconds: float = 15) -> Decision:
    """Return what is to be done. Pure: equal arguments give equal answers."""
    case = Case(job=job, seen=seen, now=now, status_seconds=status_seconds)
    for policy in POLICIES:
        decision = policy(case)
        if decision is not None:
            if policy is not is_somebody_elses:
                decision = keep_up_with_kueue(decision, case)
            return _rounded_off(decision, case, limited=policy in LIMITED)
    raise AssertionError("the last policy always answers")


def _rounded_off(decision: Decision, case: Case, *, limited: bool) -> Decision:
    """Return the decision with what is common to all: no write for cents alone, and a timer for what comes by time."""
    status, again = decision.status, decision.again_seconds
    silent = [pod.node_state for pod in case.live_pods if pod.node_state.lost]
    for state in silent:  # the end of the wait for it is no event
        again = _sooner(again, max(1.0, state.seconds_to_lost(case.now)))
    if decision.delete:
        # One that turns out to be gone already is forgotten, and no event will tell of it.
        again = _sooner(again, GONE_SECONDS)
    if status is not None:
        status = worth_a_write(status, case.status, gpus=status.gpus)
        if is_finished(status):
            again = 0  # what follows from the end, its deletion by time among it, is for the next look
        elif limited:
            again = _sooner(again, seconds_to_next(replace(case, job=replace(case.job, status=status))))
    elif limited:
        again = _sooner(again, seconds_to_next(case))
    return replace(decision, status=status, again_seconds=again)


def _sooner(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
