"""Nodes that are not for the pod: other GPUs, labels, taints, or no such nodes at all."""

from __future__ import annotations

from testkit.cluster import NodeSpec
from testkit.recording.clouds import AUTO, CLOUDS, CPU, EKS, GFD, GKE, KARPENTER, PROFILE, Cloud
from testkit.recording.situation import Situation, Situations
from testkit.recording.stage import Stage

SITUATIONS = Situations()


def _other_gpu(stage: Stage, cloud: Cloud) -> None:
    for spec in (CPU, cloud.stranger("other-1"), cloud.stranger("other-2")):
        stage.node(spec)
    stage.settle()
    stage.submit(cloud.preset, PROFILE)
    stage.judged()


for _name, _cloud in CLOUDS.items():
    SITUATIONS.add(
        Situation(
            name=f"other-gpu-{_name}",
            tells=f"Free GPUs, and none of them is the profile's; labels and taints of {_cloud.preset}",
            make=lambda stage, cloud=_cloud: _other_gpu(stage, cloud),  # type: ignore[misc]
            cause="TaintOrSelectorMismatch",
            detail=(_cloud.asks,),
            hint=("nodeAffinity",),
        )
    )


def _only_spot(stage: Stage, cloud: Cloud) -> None:
    spec = cloud.node("spot-1")
    stage.node(NodeSpec("spot-1", gpus=8, labels={**spec.labels, **cloud.spot}, taints=spec.taints))
    stage.node(CPU)
    stage.settle()
    stage.submit(cloud.preset, PROFILE)
    stage.judged()


for _name in ("gke", "eks", "karpenter"):
    SITUATIONS.add(
        Situation(
            name=f"only-spot-nodes-{_name}",
            tells=f"The GPUs are on spot nodes, and the job's capacity is OnDemand; {_name}",
            make=lambda stage, cloud=CLOUDS[_name]: _only_spot(stage, cloud),  # type: ignore[misc]
            cause="TaintOrSelectorMismatch",
            detail=(next(iter(CLOUDS[_name].spot)),),
            hint=("capacity",),
        )
    )


def _no_spot(stage: Stage, cloud: Cloud) -> None:
    stage.node(cloud.node("a100-1"))
    stage.settle()
    stage.submit(cloud.preset, PROFILE, capacity="Spot")
    stage.judged()


for _name in ("gke", "auto"):
    SITUATIONS.add(
        Situation(
            name=f"no-spot-node-{_name}",
            tells=f"The job's capacity is Spot, and the GPUs are on demand; {_name}",
            make=lambda stage, cloud=CLOUDS[_name]: _no_spot(stage, cloud),  # type: ignore[misc]
            cause="TaintOrSelectorMismatch",
            detail=(next(iter(CLOUDS[_name].spot)),),
            hint=("capacity",),
        )
    )


@SITUATIONS("TaintOrSelectorMismatch", "gke-gpu-partition-size")
def sliced_on_gke(stage: Stage) -> None:
    """The right GPU, cut into slices."""
    labels = {**GKE.labels, "cloud.google.com/gke-gpu-partition-size": "3g.40gb"}
    stage.node(NodeSpec("slices-1", gpus=16, labels=labels, taints=(GKE.taint,)))
    stage.node(GKE.stranger("h100-1"))
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.judged()


@SITUATIONS("TaintOrSelectorMismatch", "gke-gpu-sharing-strategy")
def shared_on_gke(stage: Stage) -> None:
    """The right GPU, shared in time."""
    labels = {**GKE.labels, "cloud.google.com/gke-gpu-sharing-strategy": "time-sharing"}
    stage.node(NodeSpec("shared-1", gpus=16, labels=labels, taints=(GKE.taint,)))
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.judged()


@SITUATIONS("TaintOrSelectorMismatch", "topology.kubernetes.io/zone=us-east1-a")
def zone_of_the_user(stage: Stage) -> None:
    """The user asks for a zone without GPU nodes."""
    zone = {"topology.kubernetes.io/zone": "us-east1-b"}
    spec = GKE.node("a100-1")
    stage.node(NodeSpec("a100-1", gpus=8, labels={**spec.labels, **zone}, taints=spec.taints))
    stage.node(NodeSpec("cpu-1", labels={"topology.kubernetes.io/zone": "us-east1-a"}))
    stage.settle()
    stage.submit("gke", PROFILE, podOverrides={"nodeSelector": {"topology.kubernetes.io/zone": "us-east1-a"}})
    stage.judged()


@SITUATIONS("TaintOrSelectorMismatch", "pool=trainig")
def typing_error_of_the_user(stage: Stage) -> None:
    """The user's selector has a typing error."""
    spec = GFD.node("a100-1")
    stage.node(NodeSpec("a100-1", gpus=8, labels={**spec.labels, "pool": "training"}, taints=spec.taints))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, podOverrides={"nodeSelector": {"pool": "trainig"}})
    stage.judged()


@SITUATIONS("TaintOrSelectorMismatch", "sandbox=gvisor")
def nodes_of_the_runtime_class(stage: Stage) -> None:
    """The runtime class runs on certain nodes only, and none of them has GPUs."""
    runtime = {"metadata": {"name": "gvisor"}, "handler": "gvisor"}
    stage.make("runtimeclasses", {**runtime, "scheduling": {"nodeSelector": {"sandbox": "gvisor"}}})
    stage.node(GFD.node("a100-1"))
    stage.node(NodeSpec("cpu-1", labels={"sandbox": "gvisor"}))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, changed={"runtimeClassName": "gvisor"})
    stage.judged()


@SITUATIONS("TaintOrSelectorMismatch", "kubernetes.io/hostname NotIn [a100-1]", hint=("excludedNodes",))
def excluded_by_us(stage: Stage) -> None:
    """The only node that fits is one on which an attempt failed."""
    stage.node(GKE.node("a100-1"))
    stage.node(GKE.stranger("h100-1"))
    stage.settle()
    stage.submit("gke", PROFILE, avoided=("a100-1",))
    stage.judged()


@SITUATIONS("InsufficientGPU", "team-b/dogs")
def excluded_by_us_and_full(stage: Stage) -> None:
    """An attempt failed on one node, the other is full."""
    for number in (1, 2):
        stage.node(GKE.node(f"a100-{number}"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-2", gpus=8, job="dogs")
    stage.settle()
    stage.submit("gke", PROFILE, avoided=("a100-1",))
    stage.judged()


def _tainted(stage: Stage, cloud: Cloud, taint: str, *, gpus: int = 8) -> None:
    stage.node(CPU)
    stage.node(cloud.node("a100-1", gpus=gpus, taints=(taint,)))
    stage.node(cloud.stranger("other-1"))
    stage.settle()
    stage.submit(cloud.preset, PROFILE)
    stage.judged()


@SITUATIONS("TaintOrSelectorMismatch", "dedicated=research:NoSchedule", hint=("dedicated=research:NoSchedule",))
def taint_of_another_team(stage: Stage) -> None:
    """The node is reserved for another team."""
    _tainted(stage, GFD, "dedicated=research:NoSchedule")


@SITUATIONS("TaintOrSelectorMismatch", "maintenance:NoExecute", hint=("maintenance:NoExecute",))
def taint_that_evicts(stage: Stage) -> None:
    """The node has a taint of the admin's with NoExecute."""
    _tainted(stage, EKS, "maintenance:NoExecute")


@SITUATIONS("TaintOrSelectorMismatch", "gpu-node=a100:NoSchedule", hint=("gpu-node=a100:NoSchedule",))
def taint_of_the_gpu_pool(stage: Stage) -> None:
    """Karpenter's NodePool has a taint of its own that the profile does not tolerate."""
    _tainted(stage, KARPENTER, "gpu-node=a100:NoSchedule")


@SITUATIONS("TaintOrSelectorMismatch", "nvidia.com/gpu=true:NoSchedule")
def taint_without_toleration_in_the_profile(stage: Stage) -> None:
    """The profile lacks the usual toleration."""
    stage.node(AUTO.node("a100-1"))
    stage.settle()
    stage.submit("eks-auto-mode", PROFILE, changed={"tolerations": None})
    stage.judged()


@SITUATIONS("TaintOrSelectorMismatch", "team=x:NoSchedule")
def taints_of_two_kinds(stage: Stage) -> None:
    """Two nodes fit: one has one taint, the other two, none of them tolerated."""
    stage.node(GKE.node("a100-1", taints=("team=x:NoSchedule",)))
    stage.node(GKE.node("a100-2", taints=("dedicated=y:NoSchedule", "stage=test:NoSchedule")))
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.judged()


@SITUATIONS("NoSuchNode", "nvidia.com/gpu", hint=("add nodes",))
def no_gpu_node(stage: Stage) -> None:
    """The cluster has no GPU at all."""
    for number in (1, 2):
        stage.node(NodeSpec(f"cpu-{number}", cpu=16, memory_gib=64))
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.judged()


@SITUATIONS("NoSuchNode", hint=("add nodes",))
def no_node(stage: Stage) -> None:
    """The cluster has no node at all."""
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE)
    stage.judged()


@SITUATIONS("NoSuchNode", "nvidia.com/mig-3g.40gb")
def no_slice(stage: Stage) -> None:
    """The profile is for MIG slices, and the GPUs are whole."""
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", "mig-40gb")
    stage.judged()


@SITUATIONS("NodeProvisioning", "a100-1")
def gpus_not_reported_yet(stage: Stage) -> None:
    """The node has just come: it has its labels, and its device plugin does not run yet."""
    stage.node(GKE.node("a100-1", gpus=0))
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.judged()
