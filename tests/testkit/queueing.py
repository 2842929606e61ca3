"""Jobs in a queue of Kueue, as the cluster shows them: pods that are held back, admitted, evicted, and Workloads."""

from __future__ import annotations

from typing import Any

from diffusion_api import names
from testkit.builders import Object, at, deleting, last_word, make_job, merge, terminated
from testkit.deciding import after, ask

QUEUE, PRIORITY = names.LABEL_QUEUE, names.LABEL_QUEUE_PRIORITY
GATED = {"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]}
EVICTED = {
    "conditions": [
        {
            "type": "TerminationTarget",
            "status": "True",
            "reason": "WorkloadEvictedDueToPreempted",
            "message": "Preempted to accommodate a workload",
        }
    ]
}


def queued_job(*, queue: str = "main", priority: str = "", **more: Any) -> Object:
    labels = {QUEUE: queue} | ({PRIORITY: priority} if priority else {})
    return make_job(metadata={"labels": labels}, **more)


def as_kueue_shows(pod: Object, **changes: Any) -> Object:
    """Return the pod that the operator asked for as it stands in the cluster: gated, and held by a finalizer."""
    rank = pod["metadata"]["name"].split("-")[-1]
    base = {
        "metadata": {
            "uid": pod["metadata"]["name"],
            "resourceVersion": "10",
            "finalizers": [names.FINALIZER_KUEUE],
            "creationTimestamp": at(-60),
            "labels": {names.LABEL_RANK: rank},
        },
        "spec": GATED,
        "status": {"phase": "Pending"},
    }
    return merge(merge(pod, base), changes)


def waiting(job: Object | None = None) -> tuple[Object, Object]:
    """Return a job whose first attempt waits in its queue, and the pod."""
    job = job or queued_job()
    decision = ask(job)
    job = after(job, decision)
    pod = as_kueue_shows(decision.create[-1])
    return after(job, ask(job, pod)), pod


def admitted(job: Object | None = None) -> tuple[Object, Object]:
    """Return a job whose first attempt runs, and the pod."""
    job, pod = waiting(job)
    pod = merge(pod, {"spec": {"schedulingGates": None, "nodeName": "n1"}, "status": {"phase": "Running"}})
    return after(job, ask(job, pod)), pod


def evicted(pod: Object, code: int = 75) -> Object:
    word = terminated(code, message=last_word(code), finished=0)
    gone = deleting(asked=-5, grace=120)
    return merge(pod, {"metadata": gone, "status": {"phase": "Failed"} | word | EVICTED})


def workload(
    name: str,
    *,
    age: float,
    priority: int = 0,
    queue: str = "main",
    uid: str = "",
    reserved: str = "False",
    active: bool = True,
) -> Object:
    message = "couldn't assign flavors to pod set rank: insufficient unused quota for nvidia.com/gpu in flavor a100"
    condition = {
        "type": "QuotaReserved",
        "status": reserved,
        "reason": "Pending",
        "message": f"{message}, 1 more needed",
    }
    return {
        "metadata": {"name": name, "namespace": "team-a", "uid": uid or name, "creationTimestamp": at(-age)},
        "spec": {"queueName": queue, "priority": priority, "active": active},
        "status": {"conditions": [condition]},
    }
