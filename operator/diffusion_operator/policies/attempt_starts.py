"""The start of an attempt: its number goes into the status first, and its pods are created after that."""

from __future__ import annotations

from diffusion_api.status import MAX_ATTEMPTS, Attempt, JobStatus
from diffusion_operator import timestamps
from diffusion_operator.desired import pod, pod_group, service
from diffusion_operator.policies.choices import current, placed
from diffusion_operator.policies.faulty_nodes import avoided
from diffusion_operator.policies.leftovers import leftovers
from diffusion_operator.policies.queueing import place
from diffusion_operator.policies.validation import accepted
from diffusion_operator.state import Case, Decision, Object
from diffusion_operator.status import add_attempt, count, set_condition

STARTING = "Starting"
"""Reason of PodsReady from the status write until all pods have been seen. Afterwards a missing pod is a lost one."""


def attempt_starts(case: Case) -> Decision | None:
    """Start the next attempt."""
    return open_next(case, accepted(case), rule="attemptStarts")


def is_starting(case: Case) -> bool:
    """Return whether pods of the open attempt may not have been created yet."""
    condition = case.job.condition("PodsReady")
    return case.job.open_attempt is not None and condition is not None and condition.reason == STARTING


def open_next(case: Case, status: JobStatus, *, rule: str) -> Decision:
    """Return the decision to start another attempt, or to stop pods of earlier ones that still run."""
    strays = tuple(found for found in case.live_pods if not found.gone)
    if strays:
        stopping = tuple(found for found in strays if not found.deleting)
        return Decision(rule=rule, status=status, delete=stopping, again_seconds=5)
    # Pods may be of later attempts than the status knows, where it was restored from a backup.
    number = max([status.attempt, *(found.attempt for found in case.seen.pods)]) + 1
    status, attempt = _placed_attempt(case, status, number=number)
    status = add_attempt(status, attempt, keep=MAX_ATTEMPTS)
    if number > 1:
        status = count(status, restarts=1)
    status = status.model_copy(
        update={
            "phase": "Scheduling",
            "message": f"attempt {number} starts{_where(status)}",
            "next_attempt_at": None,
        }
    )
    status = status.model_copy(update={"workload": place(case, status, _unqueued(case, status)[0])})
    generation = case.job.generation
    status = resumed(case, status)
    for kind in ("PodsReady", "Progressing"):
        message = f"the pods of attempt {number} are being created"
        status = set_condition(
            status, kind, "False", reason=STARTING, message=message, generation=generation, now=case.now
        )
    return Decision(rule=rule, status=status, create=services(case) + pods(case, status), delete=leftovers(case))


def _placed_attempt(case: Case, status: JobStatus, *, number: int) -> tuple[JobStatus, Attempt]:
    """Return the status with the choice of the attempt, and the attempt."""
    status = placed(case, status)
    if status.placement is None:
        raise AssertionError("an attempt has a placement from here on")
    attempt = Attempt(
        number=number,
        started_at=timestamps.to_text(case.now),
        profile=status.placement.profile,
        capacity=status.placement.capacity,
    )
    return status, attempt


def _where(status: JobStatus) -> str:
    """Return on what the attempt starts, where that is not what the user would rather have."""
    placement = status.placement
    return f" on {placement.message}" if placement is not None and placement.reason != "First" else ""


def resumed(case: Case, status: JobStatus) -> JobStatus:
    """Return the status of a job that goes on; one that was never suspended has nothing to say of it."""
    suspended = next((found for found in status.conditions if found.type == "Suspended"), None)
    if suspended is None or suspended.reason == "Resumed":
        return status
    return set_condition(
        status,
        "Suspended",
        "False",
        reason="Resumed",
        message="the job goes on",
        generation=case.job.generation,
        now=case.now,
    )


def pods(case: Case, status: JobStatus) -> tuple[Object, ...]:
    """Return the manifests of all pods of the newest attempt: a function of job, status and profiles alone."""
    manifests = _unqueued(case, status)
    if status.workload is None:
        return manifests
    return pod_group.join(manifests, pod_group.asked(case.job, case.spec), workload=status.workload)


def _unqueued(case: Case, status: JobStatus) -> tuple[Object, ...]:
    choice = current(case, status)
    attempt = pod.Attempt(
        number=status.attempt,
        micro_batch_size=status.micro_batch_size,
        trainer_image=case.seen.trainer_image,
        avoided_nodes=avoided(status, status.attempts[0]),
        capacity=choice.capacity,
    )
    ranks = range(case.spec.resources.nodes)
    profile = case.offered(choice.profile)
    return tuple(pod.build(case.job, case.spec, profile, attempt=attempt, rank=rank) for rank in ranks)


def services(case: Case) -> tuple[Object, ...]:
    """Return the manifests of what pods on several nodes need to find each other; there may be some already."""
    return (service.build(case.job),) if case.spec.resources.nodes > 1 else ()
