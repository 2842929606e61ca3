"""Pods that hold a node and its GPUs and cannot start there: given up after a while, tried again after a backoff.

The kubelet would try for ever. Whoever waits in a queue for these GPUs should not, and another node may do better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffusion_api.outcomes import OF_CAUSE, Cause
from diffusion_api.waiting import WaitingCause
from diffusion_operator import timestamps
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.policies.faulty_nodes import avoid
from diffusion_operator.policies.stopping import being_stopped, stop
from diffusion_operator.state import Case, Decision
from diffusion_operator.status import duration

VAIN_SECONDS = 900
"""The kubelet's pauses between two pulls grow to 5 minutes: it has tried more than ten times by then."""
IN_VAIN: Mapping[str, Cause] = {
    WaitingCause.IMAGE_PULL_FAILED: Cause.IMAGE_PULL_FAILED,
    WaitingCause.MOUNT_FAILED: Cause.MOUNT_FAILED,
    WaitingCause.MISSING_SECRET: Cause.MOUNT_FAILED,
    WaitingCause.MISSING_PERSISTENT_VOLUME_CLAIM: Cause.MOUNT_FAILED,
    WaitingCause.VOLUME_BINDING: Cause.MOUNT_FAILED,
    WaitingCause.CONTAINER_CONFIG_ERROR: Cause.ADMISSION_REJECTED,
    WaitingCause.MISSING_RUNTIME_CLASS: Cause.ADMISSION_REJECTED,
    WaitingCause.SANDBOX_FAILED: Cause.ADMISSION_REJECTED,
}
"""What a pod that has a node may wait for in vain, and the cause of the attempt's end then."""


def starts_in_vain(case: Case) -> Decision | None:
    """Delete the pods of an attempt that cannot start where they are; it ends for that reason and backs off."""
    if told := being_stopped(case, *set(IN_VAIN.values())):
        return stop(case, told, rule="vainStart")
    why = _in_vain(case)
    if why is None:
        return None
    decision = stop(case, why, rule="vainStart")
    if case.status.pending and case.status.pending.cause == WaitingCause.SANDBOX_FAILED and decision.status:
        # Network and runtime are the node's own: others may well have sound ones.
        pods = case.pods_of(case.status.attempts[0].number)
        nodes = [pod.node for pod in pods if pod.waits_on_its_node]
        return replace(decision, status=avoid(case, decision.status, nodes, why.cause))
    return decision


def _in_vain(case: Case) -> Ending | None:
    attempt, pending = case.job.open_attempt, case.status.pending
    if attempt is None or pending is None or pending.cause not in IN_VAIN:
        return None
    pods = case.pods_of(attempt.number)
    if any(pod.deleting or not pod.live(case.now) for pod in pods) or not any(pod.waits_on_its_node for pod in pods):
        return None
    waited = (case.now - timestamps.from_text(pending.since)).total_seconds()
    if waited < VAIN_SECONDS:
        return None
    outcome = OF_CAUSE[IN_VAIN[pending.cause]]
    message = f"{outcome.explanation}, tried for {duration(waited)} ({pending.detail}): {pending.hint}"
    return Ending(cause=outcome.cause, message=message)
