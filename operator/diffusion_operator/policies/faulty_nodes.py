"""`status.excludedNodes`: where an attempt failed by the node's fault, the next ones do not go, for a while."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from diffusion_api.outcomes import Cause
from diffusion_api.status import MAX_EXCLUDED_NODES, Attempt, ExcludedNode, JobStatus
from diffusion_operator import timestamps
from diffusion_operator.policies.evidence import ending_of
from diffusion_operator.state import Case, SeenPod

AVOIDED_FOR = {
    Cause.GPU_FAULT: timedelta(hours=24),
    Cause.ADMISSION_REJECTED: timedelta(hours=1),
    Cause.NODE_LOST: timedelta(hours=1),
}
"""How long; a broken GPU needs somebody, the others mostly heal by themselves."""
DEVICE_REFUSED = "UnexpectedAdmissionError"


def exclude(case: Case, status: JobStatus, cause: Cause) -> JobStatus:
    """Return the status with the nodes at fault for the end of the newest attempt; past exclusions are dropped."""
    return avoid(case, status, _at_fault(case, status, cause), cause)


def avoid(case: Case, status: JobStatus, nodes: Iterable[str], cause: Cause) -> JobStatus:
    """Return the status with these nodes excluded from now on, for as long as the cause asks for."""
    kept = {entry.node: entry for entry in status.excluded_nodes if timestamps.from_text(entry.until) > case.now}
    for node in nodes:
        until = timestamps.to_text(case.now + AVOIDED_FOR[cause])
        kept.pop(node, None)
        kept[node] = ExcludedNode(node=node, until=until, reason=str(cause))
    return status.model_copy(update={"excluded_nodes": tuple(kept.values())[-MAX_EXCLUDED_NODES:]})


def avoided(status: JobStatus, attempt: Attempt) -> tuple[str, ...]:
    """Return the nodes that the attempt avoids: a function of the status alone, whenever its pods are created."""
    start = timestamps.from_text(attempt.started_at)
    return tuple(sorted(entry.node for entry in status.excluded_nodes if timestamps.from_text(entry.until) > start))


def _at_fault(case: Case, status: JobStatus, cause: Cause) -> list[str]:
    if cause not in AVOIDED_FOR:
        return []
    pods = [pod for pod in case.pods_of(status.attempt) if pod.node]
    guilty = [pod for pod in pods if ending_of((pod,), stopped=False, now=case.now).cause == cause]
    if cause == Cause.ADMISSION_REJECTED:
        guilty = [pod for pod in guilty if _for_its_devices(pod, case)]
    if cause == Cause.NODE_LOST:
        # Once is what spot nodes do; a node that comes back only to be lost again is no good.
        before = {node for item in status.attempts[1:] if item.cause == cause for node in item.nodes}
        guilty = [pod for pod in guilty if pod.node in before]
    return [pod.node for pod in guilty]


def _for_its_devices(pod: SeenPod, case: Case) -> bool:
    return pod.reason in {DEVICE_REFUSED, f"OutOf{case.profile.resource_name}"}
