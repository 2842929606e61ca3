"""Nodes that fit and are not well, are leaving, or are still coming."""

from __future__ import annotations

from testkit.recording.clouds import CPU, EKS, GFD, GKE, KARPENTER, PROFILE, Cloud
from testkit.recording.plant import LEASE_SECONDS
from testkit.recording.situation import Situations
from testkit.recording.stage import Stage

SITUATIONS = Situations()
READY = {"reason": "KubeletReady", "message": "kubelet is posting ready status"}
NETWORK = "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady"


def _silent(stage: Stage, cloud: Cloud, name: str, *, ready: bool = True) -> None:
    stage.node(cloud.node(name), silent=True)
    if ready:
        stage.say(name, "Ready", "True", **READY)
    else:
        stage.say(name, "Ready", "False", reason="KubeletNotReady", message=NETWORK)
        _await_taint(stage, name, "node.kubernetes.io/not-ready")


def _submit(stage: Stage, cloud: Cloud, *unready: str) -> None:
    stage.settle(unready=unready)
    stage.submit(cloud.preset, PROFILE)
    stage.judged()


@SITUATIONS("NodeCordoned", "a100-1", hint=("kubectl uncordon a100-1",))
def cordoned(stage: Stage) -> None:
    """The only node that fits is cordoned."""
    stage.node(CPU)
    stage.node(GKE.node("a100-1"))
    stage.kube.kubectl("cordon", "a100-1")
    _submit(stage, GKE)


@SITUATIONS("NodeCordoned", "2 of 2")
def both_cordoned(stage: Stage) -> None:
    """Both nodes that fit are cordoned; one with another GPU is free."""
    stage.node(EKS.stranger("g5-1"))
    for number in (1, 2):
        stage.node(EKS.node(f"a100-{number}"))
        stage.kube.kubectl("cordon", f"a100-{number}")
    _submit(stage, EKS)


@SITUATIONS("NodeCordoned", "karpenter.sh/disrupted")
def disrupted_by_karpenter(stage: Stage) -> None:
    """Karpenter is about to replace the node."""
    stage.node(KARPENTER.node("a100-1", taints=("karpenter.sh/disrupted:NoSchedule",)))
    _submit(stage, KARPENTER)


@SITUATIONS("NodeCordoned", "ToBeDeletedByClusterAutoscaler")
def deleted_by_the_autoscaler(stage: Stage) -> None:
    """The cluster autoscaler is about to remove the node."""
    stage.node(GKE.node("a100-1", taints=("ToBeDeletedByClusterAutoscaler=1790000000:NoSchedule",)))
    _submit(stage, GKE)


@SITUATIONS("NodeProvisioning", "a100-1")
def registering_with_karpenter(stage: Stage) -> None:
    """The node has come, and Karpenter has not initialised it."""
    stage.node(KARPENTER.node("a100-1", taints=("karpenter.sh/unregistered:NoExecute",)))
    _submit(stage, KARPENTER)


@SITUATIONS("NodeProvisioning", "a100-1")
def waiting_for_the_cloud(stage: Stage) -> None:
    """The cloud's controller has not initialised the node."""
    stage.node(EKS.node("a100-1", taints=("node.cloudprovider.kubernetes.io/uninitialized=true:NoSchedule",)))
    _submit(stage, EKS)


@SITUATIONS("NodeNotReady", "a100-1", "container runtime is down")
def runtime_down(stage: Stage) -> None:
    """The kubelet says that its node is not ready; the taint is the controller's."""
    _silent(stage, GFD, "a100-1")
    stage.settle()
    stage.say("a100-1", "Ready", "False", reason="KubeletNotReady", message="container runtime is down")
    _await_taint(stage, "a100-1", "node.kubernetes.io/not-ready")
    _submit(stage, GFD, "a100-1")


@SITUATIONS("NodeNotReady", "a100-1", "disk pressure")
def disk_pressure(stage: Stage) -> None:
    """The node's disk is full; the taint is the controller's."""
    _silent(stage, GKE, "a100-1")
    message = "kubelet has disk pressure"
    stage.say("a100-1", "DiskPressure", "True", reason="KubeletHasDiskPressure", message=message)
    _await_taint(stage, "a100-1", "node.kubernetes.io/disk-pressure")
    _submit(stage, GKE)


@SITUATIONS("NodeNotReady", "a100-1")
def unreachable(stage: Stage) -> None:
    """The kubelet has not been heard of for a while; condition and taint are the controller's."""
    _silent(stage, KARPENTER, "a100-1")
    stage.settle()
    _await_taint(stage, "a100-1", "node.kubernetes.io/unreachable")
    _submit(stage, KARPENTER, "a100-1")


@SITUATIONS("NodeNotReady", "a100-1")
def just_registered(stage: Stage) -> None:
    """The node has registered, and its network is not ready; the taint is the API server's."""
    _silent(stage, GKE, "a100-1", ready=False)
    _submit(stage, GKE, "a100-1")


@SITUATIONS("NodeCordoned", "a100-1", hint=("uncordon a100-1",))
def cordoned_beside_not_ready(stage: Stage) -> None:
    """One node that fits is cordoned, the other is not ready."""
    stage.node(GKE.node("a100-1"))
    stage.kube.kubectl("cordon", "a100-1")
    _silent(stage, GKE, "a100-2", ready=False)
    _submit(stage, GKE, "a100-2")


@SITUATIONS("NodeNotReady", "a100-1")
def not_ready_beside_tainted(stage: Stage) -> None:
    """One node that fits is not ready, the other is another team's."""
    _silent(stage, GFD, "a100-1", ready=False)
    stage.node(GFD.node("a100-2", taints=("dedicated=research:NoSchedule",)))
    _submit(stage, GFD, "a100-1")


@SITUATIONS("InsufficientGPU", "team-b/dogs")
def full_beside_not_ready(stage: Stage) -> None:
    """One node that fits is full, the other is not ready: the job goes on where the first becomes free."""
    stage.node(GFD.node("a100-1"))
    _silent(stage, GFD, "a100-2", ready=False)
    stage.settle(unready=("a100-2",))
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    _submit(stage, GFD, "a100-2")


@SITUATIONS("NodeNotReady", "a100-1")
def died_after_binding(stage: Stage) -> None:
    """The pod has a node, which has not been heard of since."""
    _silent(stage, GKE, "a100-1")
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.placed("cats-1-0")
    _await_taint(stage, "a100-1", "node.kubernetes.io/unreachable")


@SITUATIONS("Starting", "a100-1")
def starting(stage: Stage) -> None:
    """The pod has just been given a node, whose kubelet has said nothing yet."""
    _silent(stage, GKE, "a100-1")
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.placed("cats-1-0")


def _await_taint(stage: Stage, node: str, key: str) -> None:
    stage.kube.wait_for(
        "nodes",
        node,
        lambda found: key in {taint["key"] for taint in found["spec"].get("taints") or ()},
        timeout=LEASE_SECONDS + 60,
        describe=f"taint {key}",
    )
