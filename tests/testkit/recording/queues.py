"""Jobs that Kueue holds back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from testkit import kueue
from testkit.builders import merge
from testkit.kube import Object, condition
from testkit.recording.clouds import GFD, PROFILE
from testkit.recording.plant import NAMESPACE
from testkit.recording.situation import Situations
from testkit.recording.stage import Stage
from testkit.waiting import wait_until

SITUATIONS = Situations()
PLENTY = {"cpu": "1000", "memory": "10000Gi", "ephemeral-storage": "10000Gi"}
QUEUE = "main"
CLOUD = GFD.preset
SILENCE = 15
"""Seconds after which Kueue has said of a job what it says at all."""


def _offer(
    stage: Stage,
    gpus: int,
    *,
    name: str = "gpus",
    queue: str = QUEUE,
    flavor: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    lacking: str = "",
) -> None:
    """Make a flavor, a ClusterQueue of so many GPUs and a LocalQueue for it; `more` is merged into the ClusterQueue."""
    quota: dict[str, str | int] = {"nvidia.com/gpu": gpus, **PLENTY}
    quota.pop(lacking, None)
    stage.make("resourceflavors", merge(kueue.resource_flavor(name), {"spec": flavor or {}}))
    stage.make("clusterqueues", merge(kueue.cluster_queue(name, flavor=name, quota=quota), {"spec": more or {}}))
    stage.make("localqueues", kueue.local_queue(queue, cluster_queue=name), namespace=NAMESPACE)


def _node(stage: Stage) -> None:
    stage.node(GFD.node("a100-1"))
    stage.settle()


def _submit(stage: Stage, until: Callable[[Object], Any] | None = None, **more: Any) -> None:
    stage.submit(CLOUD, PROFILE, **{"queue": QUEUE, **more})
    stage.queued(until or kueue.waiting)


def _saying(*words: str) -> Callable[[Object], bool]:
    """Return whether Kueue has said all of the words of a Workload."""

    def said(workload: Object) -> bool:
        message = str(condition(workload, "QuotaReserved").get("message", ""))
        return all(word in message for word in words)

    return said


def _occupied(stage: Stage, gpus: int, *, queue: str = QUEUE, priority: str = "") -> None:
    """Have another job of the namespace take GPUs of the queue."""
    labels = {"kueue.x-k8s.io/queue-name": queue} | ({"kueue.x-k8s.io/priority-class": priority} if priority else {})
    resources = {"requests": {"cpu": "1"}, "limits": {"nvidia.com/gpu": str(gpus)}}
    container = {"name": "main", "image": "none", "resources": resources}
    security: Object = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    spec: Object = {"containers": [container], "securityContext": security, "restartPolicy": "Never"}
    spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    stage.kube.api.create("pods", {"metadata": {"name": "dogs", "labels": labels}, "spec": spec}, namespace=NAMESPACE)

    def admitted() -> bool:
        return any(kueue.admitted(entry) for entry in stage.kube.items("workloads", namespace=NAMESPACE))

    wait_until(admitted, describe="the other job to be admitted")


@SITUATIONS("QueueMissing", "main", hint=("queue-name",))
def queue_missing(stage: Stage) -> None:
    """The LocalQueue does not exist."""
    _node(stage)
    _submit(stage)


@SITUATIONS("QueueMissing")
def cluster_queue_missing(stage: Stage) -> None:
    """The LocalQueue is of a ClusterQueue that does not exist."""
    stage.make("localqueues", kueue.local_queue(QUEUE, cluster_queue="gone"), namespace=NAMESPACE)
    _submit(stage)


@SITUATIONS("QueueStopped", hint=("ask who runs the queue",))
def cluster_queue_stopped(stage: Stage) -> None:
    """The ClusterQueue is on hold."""
    _offer(stage, 8, more={"stopPolicy": "Hold"})
    _submit(stage)


@SITUATIONS("QueueStopped", hint=("ask who runs the queue",))
def local_queue_stopped(stage: Stage) -> None:
    """The LocalQueue is on hold, of which its Workloads say nothing."""
    _offer(stage, 8)
    stage.kube.api.patch("localqueues", QUEUE, {"spec": {"stopPolicy": "Hold"}}, namespace=NAMESPACE)
    _submit(stage, bool)
    stage.aged(SILENCE)


@SITUATIONS("QueueStopped", "inactive")
def flavor_missing(stage: Stage) -> None:
    """The ClusterQueue names a flavor that does not exist, and is inactive therefore."""
    quota: dict[str, str | int] = {"nvidia.com/gpu": 8, **PLENTY}
    stage.make("clusterqueues", kueue.cluster_queue("gpus", flavor="gone", quota=quota))
    stage.make("localqueues", kueue.local_queue(QUEUE, cluster_queue="gpus"), namespace=NAMESPACE)
    _submit(stage)


@SITUATIONS("WaitingForQuota", "1 more needed", hint=("wait",))
def quota_used(stage: Stage) -> None:
    """Another job has all of the quota."""
    _node(stage)
    _offer(stage, 4)
    _occupied(stage, 4)
    _submit(stage)


@SITUATIONS("WaitingForQuota", "1 more needed")
def quota_partly_used(stage: Stage) -> None:
    """Three of four GPUs are used, and the job wants two."""
    _offer(stage, 4)
    _occupied(stage, 3)
    _submit(stage, gpus=2)


@SITUATIONS("ExceedsMaxQuota", "nvidia.com/gpu", hint=("gpusPerNode",))
def more_than_the_quota(stage: Stage) -> None:
    """The job wants more GPUs than the queue has in all."""
    _node(stage)
    _offer(stage, 4)
    _submit(stage, gpus=8)


@SITUATIONS("ExceedsMaxQuota", "nvidia.com/gpu", hint=("spec.resources.nodes",))
def two_pods_more_than_the_quota(stage: Stage) -> None:
    """Two pods together want more than the queue has in all."""
    _offer(stage, 8)
    _submit(stage, nodes=2, gpus=8)


@SITUATIONS("ExceedsMaxQuota", "memory")
def memory_more_than_the_quota(stage: Stage) -> None:
    """The quota has the GPUs, and never the memory."""
    groups = kueue.cluster_queue("gpus", flavor="gpus", quota={"nvidia.com/gpu": 8, **PLENTY, "memory": "16Gi"})
    _offer(stage, 8, more={"resourceGroups": groups["spec"]["resourceGroups"]})
    _submit(stage)


@SITUATIONS("NoMatchingFlavor", hint=("profile",))
def flavor_of_another_gpu(stage: Stage) -> None:
    """The queue's flavor is another GPU."""
    _node(stage)
    _offer(stage, 8, flavor={"nodeLabels": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}})
    _submit(stage)


@SITUATIONS("NoMatchingFlavor")
def flavor_with_a_taint(stage: Stage) -> None:
    """The queue's flavor has a taint that the job does not tolerate."""
    _offer(stage, 8, flavor={"nodeTaints": [{"key": "dedicated", "value": "research", "effect": "NoSchedule"}]})
    _submit(stage)


@SITUATIONS("NoMatchingFlavor", "ephemeral-storage")
def resource_without_quota(stage: Stage) -> None:
    """The queue has no quota for local disk, so that it never admits a job which asks for some."""
    _offer(stage, 8, lacking="ephemeral-storage")
    _submit(stage)


@SITUATIONS("QueueMissing", "namespace", hint=("namespaceSelector",))
def queue_of_other_namespaces(stage: Stage) -> None:
    """The ClusterQueue does not take the namespace."""
    _offer(stage, 8, more={"namespaceSelector": {"matchLabels": {"team": "b"}}})
    _submit(stage)


def _check(stage: Stage, *, active: bool) -> None:
    stage.make("admissionchecks", _object("AdmissionCheck", "budget", {"controllerName": "example.com/budget"}))
    if active:
        entry = {"type": "Active", "status": "True", "reason": "Active", "message": "The check is active"}
        entry["lastTransitionTime"] = "2026-01-01T00:00:00Z"
        status = {"status": {"conditions": [entry]}}
        stage.kube.api.patch("admissionchecks", "budget", status, subresource="status")
    strategy = {"admissionChecksStrategy": {"admissionChecks": [{"name": "budget"}]}}
    _offer(stage, 8, more=strategy)


def _object(kind: str, name: str, spec: Object) -> Object:
    return {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}, "spec": spec}


@SITUATIONS("WaitingForAdmissionCheck", "budget is Pending")
def check_pending(stage: Stage) -> None:
    """Quota is reserved, and a check of the queue has not passed."""
    _check(stage, active=True)
    _submit(stage, lambda found: (found.get("status") or {}).get("admissionChecks"))


@SITUATIONS("QueueStopped", "inactive")
def check_inactive(stage: Stage) -> None:
    """Nobody runs the controller of the queue's check, so that the queue is inactive."""
    _check(stage, active=False)
    _submit(stage)


@SITUATIONS("WorkloadDeactivated", hint=("spec.active: true",))
def deactivated(stage: Stage) -> None:
    """Somebody took the job out of the queue."""
    _offer(stage, 1)
    _occupied(stage, 1)
    _submit(stage)
    stage.kube.api.patch("workloads", stage.workload, {"spec": {"active": False}}, namespace=NAMESPACE)
    stage.queued(lambda found: found["spec"].get("active") is False and condition(found, "Evicted"))


@SITUATIONS("PreemptingOthers")
def preempting_in_the_queue(stage: Stage) -> None:
    """A job of lower priority was told to give its quota back, and has not yet."""
    stage.make("workloadpriorityclasses", kueue.priority_class("low", value=1))
    stage.make("workloadpriorityclasses", kueue.priority_class("high", value=100))
    stage.node(GFD.node("a100-1"), silent=True)
    stage.say("a100-1", "Ready", "True", reason="KubeletReady", message="kubelet is posting ready status")
    stage.settle()
    _offer(stage, 4)
    _occupied(stage, 4, priority="low")
    stage.placed("dogs")
    # A pod that runs takes a kubelet to stop it, and keeps its quota until then.
    stage.kube.api.patch("pods", "dogs", {"status": {"phase": "Running"}}, namespace=NAMESPACE, subresource="status")
    priority = {"labels": {"kueue.x-k8s.io/priority-class": "high"}}
    _submit(stage, _saying("preemption"), podOverrides=priority)


@SITUATIONS("GangIncomplete", "fewer runnable pods")
def group_incomplete(stage: Stage) -> None:
    """Of a group of two pods, one has been made."""
    _offer(stage, 16)
    stage.submit(CLOUD, PROFILE, queue=QUEUE, nodes=2, only=1)
    wait_until(lambda: stage.said("ErrWorkloadCompose"), describe="Kueue to miss a pod")
    stage.aged(SILENCE)


@SITUATIONS("InsufficientGPU", "team-b/birds")
def admitted_and_no_node(stage: Stage) -> None:
    """Kueue has let the job go, and somebody outside of its queues holds the GPUs."""
    _node(stage)
    stage.holder("birds-1-0", "a100-1", gpus=8, job="birds")
    stage.settle()
    _offer(stage, 8)
    _submit(stage, kueue.admitted)
    stage.judged(saying="Insufficient")


@SITUATIONS("TaintOrSelectorMismatch", "pool=gone")
def admitted_to_nodes_that_are_not_there(stage: Stage) -> None:
    """Kueue has let the job go to a flavor whose label no node has."""
    _node(stage)
    _offer(stage, 8, flavor={"nodeLabels": {"pool": "gone"}})
    _submit(stage, kueue.admitted)
    stage.judged(saying="affinity")


def _cohort(stage: Stage, *, limit: int | None) -> None:
    """Make two queues of four GPUs that lend to each other; this one borrows as many as the limit says."""
    own = kueue.cluster_queue("gpus", flavor="gpus", quota={"nvidia.com/gpu": 4, **PLENTY}, cohort="all")
    groups = own["spec"]["resourceGroups"]
    if limit is not None:
        groups[0]["flavors"][0]["resources"][0]["borrowingLimit"] = str(limit)
    _offer(stage, 4, more={"cohortName": "all", "resourceGroups": groups})
    lender = kueue.cluster_queue("lender", flavor="gpus", quota={"nvidia.com/gpu": 4, **PLENTY}, cohort="all")
    stage.make("clusterqueues", lender)
    stage.make("localqueues", kueue.local_queue("lender", cluster_queue="lender"), namespace=NAMESPACE)


@SITUATIONS("ExceedsMaxQuota", "nvidia.com/gpu")
def more_than_may_be_borrowed(stage: Stage) -> None:
    """The cohort has the GPUs, and the queue may not borrow so many."""
    _cohort(stage, limit=1)
    _submit(stage, gpus=8)


@SITUATIONS("WaitingForQuota")
def lender_uses_its_own(stage: Stage) -> None:
    """The queue could borrow what is missing, and the lender uses it at the moment."""
    _cohort(stage, limit=None)
    _occupied(stage, 2, queue="lender")
    _submit(stage, gpus=8)


@SITUATIONS("WaitingForQuota")
def second_flavor_too_small(stage: Stage) -> None:
    """Of two flavors one is in use, and the other would never be large enough."""
    stage.make("resourceflavors", kueue.resource_flavor("small"))
    own = kueue.cluster_queue("gpus", flavor="gpus", quota={"nvidia.com/gpu": 4, **PLENTY})
    small = kueue.cluster_queue("small", flavor="small", quota={"nvidia.com/gpu": 1, **PLENTY})
    groups = own["spec"]["resourceGroups"]
    groups[0]["flavors"] += small["spec"]["resourceGroups"][0]["flavors"]
    _offer(stage, 4, more={"resourceGroups": groups})
    _occupied(stage, 3)
    _submit(stage, gpus=4)


@SITUATIONS("Gated", "example.com/approval")
def admitted_and_gated_by_another(stage: Stage) -> None:
    """Kueue has let the job go, and somebody else's gate is left."""
    _offer(stage, 8)
    gates = {"spec": {"schedulingGates": [{"name": "example.com/approval"}]}}
    _submit(stage, kueue.admitted, alter=lambda manifest: merge(manifest, gates))
    wait_until(lambda: len(stage.found()[0]["spec"]["schedulingGates"]) == 1, describe="Kueue's gate to be taken away")
