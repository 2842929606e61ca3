"""A job in a queue of Kueue: which place it has, whether it was admitted, and when the place is given back.

Kueue knows a job's pods as one group, whose Workload is the place in the queue. It keeps the objects of ended pods, by
a finalizer, until their replacements are there; where none will come it has to be told, or the quota stays taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from diffusion_api import names
from diffusion_api.status import JobStatus
from diffusion_operator.desired import pod_group
from diffusion_operator.state import Case, Decision, Mark, Object, SeenPod
from diffusion_operator.status import is_finished, set_condition

JUDGING_SECONDS = 2
"""When to look again at pods that Kueue holds back and has said nothing of: nothing on the pods will tell."""
LOOK_AGAIN_SECONDS, FURTHER_SECONDS, LONGEST_SECONDS = 5, 0.1, 60
"""The same when it has: what it says changes, and is asked for the less often the more Workloads there are."""
LEAVING_SECONDS = 60
"""When to look again whether Kueue has let ended pods go, if no event says so before."""
CONDITION = "Admitted"


def place(case: Case, status: JobStatus, pod: Object) -> str | None:
    """Return the Workload of the attempt that starts, whose first pod is this one; None where it asks for no queue.

    It is that of the attempts before, so that a retry loses no place, unless the new pods cannot stand for the old
    ones: another queue, other nodes or requests, or an old pod that Kueue still counts as one of the group.
    """
    labels = pod_group.asked(case.job, case.spec)
    if not labels:
        return None
    wanted = (labels[names.LABEL_QUEUE], pod_group.role(pod))
    old = [found for found in case.seen.pods if not found.gone and found.group and found.group == status.workload]
    if status.workload and all(_replaceable(found) and _kind(found) == wanted for found in old):
        return status.workload
    return names.workload_name(case.job.name, case.job.uid, status.attempt)


def _replaceable(pod: SeenPod) -> bool:
    """Return whether Kueue takes another pod in its place: not for one that succeeded, nor one on a lost node."""
    return pod.phase == "Failed" or (pod.deleting and not pod.node)


def _kind(pod: SeenPod) -> tuple[str, str]:
    labels = pod.raw["metadata"]["labels"]
    return labels.get(names.LABEL_QUEUE, ""), _annotation(pod, names.ANNOTATION_POD_GROUP_ROLE)


def admission(case: Case, status: JobStatus, pods: Iterable[SeenPod]) -> JobStatus:
    """Return the status that says whether Kueue has admitted the pods; silent where it does not look after them."""
    held = [pod for pod in pods if pod.held]
    if not held:
        return status
    gated = [pod.name for pod in held if pod.gated]
    message = f"pod {gated[0]} is held back" if gated else f"admitted as Workload {status.workload}"
    return set_condition(
        status,
        CONDITION,
        "False" if gated else "True",
        reason="Queued" if gated else "Admitted",
        message=message,
        generation=case.job.generation,
        now=case.now,
    )


def look_again_seconds(case: Case) -> float:
    """Return when to look again at pods that Kueue holds back."""
    workload, _ = own_workload(case)
    if not (workload or {}).get("status", {}).get("conditions"):
        return JUDGING_SECONDS
    return min(LONGEST_SECONDS, LOOK_AGAIN_SECONDS + FURTHER_SECONDS * len(case.seen.workloads or ()))


def own_workload(case: Case) -> tuple[Object | None, int | None]:
    """Return the job's Workload, and its place among those that wait in its LocalQueue, from 0."""
    mine = next((one for one in case.seen.workloads or () if one["metadata"]["name"] == case.status.workload), None)
    if mine is None or not _waits(mine):
        return mine, None
    line = [one for one in case.seen.workloads or () if _waits(one) and _queue(one) == _queue(mine)]
    return mine, sorted(line, key=_turn).index(mine)


def _waits(workload: Object) -> bool:
    conditions = workload.get("status", {}).get("conditions") or ()
    over = {"QuotaReserved", "Finished"}
    settled = any(entry.get("type") in over and entry.get("status") == "True" for entry in conditions)
    return not settled and bool(workload["spec"].get("active", True))


def _queue(workload: Object) -> str:
    return str(workload["spec"].get("queueName") or "")


def _turn(workload: Object) -> tuple[int, str, str]:
    """Return what Kueue sorts a queue by: priority, then age."""
    metadata = workload["metadata"]
    return -int(workload["spec"].get("priority") or 0), str(metadata["creationTimestamp"]), str(metadata["uid"])


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """What makes Kueue give back the quota of groups to which no pods will be added."""

    mark: tuple[Mark, ...] = ()
    leave: tuple[str, ...] = ()
    """Workloads to delete."""


def leaving(pods: Iterable[SeenPod], *, kept: str | None, now: datetime) -> Leaving:
    """Return how to leave all groups but `kept` whose pods have ended.

    Pods that ran are left to be read; of those that never did Kueue lets go only with their Workload.
    """
    groups: dict[str, list[SeenPod]] = defaultdict(list)
    for pod in pods:
        if pod.held and pod.group and pod.group != kept:
            groups[pod.group].append(pod)
    mark: list[Mark] = []
    leave: list[str] = []
    for name, members in groups.items():
        if any(pod.live(now) for pod in members) or _ends_by_itself(members):
            continue
        if not all(pod.finished for pod in members):
            leave.append(name)
        elif not any(_annotation(pod, names.ANNOTATION_RETRIABLE) for pod in members):
            mark.append(Mark(pod=members[0], metadata={"annotations": {names.ANNOTATION_RETRIABLE: "false"}}))
    return Leaving(mark=tuple(mark), leave=tuple(leave))


def _ends_by_itself(members: list[SeenPod]) -> bool:
    total = _annotation(members[0], names.ANNOTATION_POD_GROUP_COUNT)
    return all(pod.phase == "Succeeded" for pod in members) and str(len(members)) == total


def _annotation(pod: SeenPod, key: str) -> str:
    return str((pod.raw["metadata"].get("annotations") or {}).get(key, ""))


def keep_up_with_kueue(decision: Decision, case: Case) -> Decision:
    """Return the decision with what Kueue has to be told: of groups that are left, and of labels that were changed."""
    status = decision.status or case.status
    over = is_finished(status) or case.job.finished or "deletionTimestamp" in case.job.metadata
    found = leaving(case.seen.pods, kept=None if over else status.workload, now=case.now)
    mark = found.mark if over else found.mark + _relabelled(case)
    if not mark and not found.leave:
        return decision
    again = LEAVING_SECONDS if decision.again_seconds is None else min(LEAVING_SECONDS, decision.again_seconds)
    return replace(decision, mark=mark, leave=found.leave, again_seconds=again)


def _relabelled(case: Case) -> tuple[Mark, ...]:
    """Return the changes that bring the user's new labels to pods that still wait: another queue, another priority."""
    if case.job.spec is None or case.job.open_attempt is None:
        return ()
    labels = pod_group.asked(case.job, case.spec)
    waiting = [pod for pod in case.pods_of(case.status.attempt) if pod.gated and not pod.deleting and pod.group]
    changes = [
        (pod, {key: value for key, value in labels.items() if pod.raw["metadata"]["labels"].get(key) != value})
        for pod in waiting
    ]
    return tuple(Mark(pod=pod, metadata={"labels": change}) for pod, change in changes if change)
