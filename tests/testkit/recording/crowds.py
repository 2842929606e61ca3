"""Nodes that fit and are full: of GPUs, of whole nodes, of everything else."""

from __future__ import annotations

from testkit.builders import merge
from testkit.cluster import NodeSpec
from testkit.kube import Object
from testkit.recording.clouds import CLOUDS, CPU, GFD, GKE, KARPENTER, PROFILE, Cloud
from testkit.recording.situation import Situation, Situations
from testkit.recording.stage import Stage

SITUATIONS = Situations()


def _full(stage: Stage, cloud: Cloud) -> None:
    for spec in (CPU, cloud.stranger("other-1"), cloud.node("a100-1")):
        stage.node(spec)
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.settle()
    stage.submit(cloud.preset, PROFILE)
    stage.judged(saying="Insufficient nvidia.com/gpu")


for _name, _cloud in CLOUDS.items():
    SITUATIONS.add(
        Situation(
            name=f"gpus-full-{_name}",
            tells=f"All GPUs of the node that fits are another job's; labels and taints of {_cloud.preset}",
            make=lambda stage, cloud=_cloud: _full(stage, cloud),  # type: ignore[misc]
            cause="InsufficientGPU",
            detail=("team-b/dogs", "0 of 8"),
        )
    )


@SITUATIONS("InsufficientGPU", "2 of 8", "asks for 4")
def gpus_partly_full(stage: Stage) -> None:
    """Two of eight GPUs are free, the job wants four."""
    stage.node(GKE.node("a100-1"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=4, job="dogs")
    stage.holder("birds-1-0", "a100-1", gpus=2, job="birds")
    stage.settle()
    stage.submit("gke", PROFILE, gpus=4)
    stage.judged()


@SITUATIONS("InsufficientGPU", "team-b/dogs", "team-b/notebook")
def gpus_full_on_three_nodes(stage: Stage) -> None:
    """Three nodes fit, all are full, of a job and of somebody's notebook; the only free GPUs are others."""
    stage.node(GFD.stranger("rtx-1"))
    for number in (1, 2, 3):
        stage.node(GFD.node(f"a100-{number}"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.holder("dogs-1-1", "a100-2", gpus=8, job="dogs")
    stage.holder("notebook", "a100-3", gpus=8)
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE)
    stage.judged()


@SITUATIONS("InsufficientGPU", "team-b/dogs")
def gpus_full_of_a_kind_of_slice(stage: Stage) -> None:
    """The profile is for MIG slices: those of its size are taken, others are free."""
    mig = {**GFD.labels, "nvidia.com/mig.strategy": "mixed"}
    for name, size in (("large", "3g.40gb"), ("small", "1g.10gb")):
        labels, resource = {**mig}, f"nvidia.com/mig-{size}"
        stage.node(NodeSpec(f"a100-{name}", gpus=2, gpu_resource=resource, labels=labels, taints=(GFD.taint,)))
    stage.settle()
    stage.holder("dogs-1-0", "a100-large", gpus=2, resource="nvidia.com/mig-3g.40gb", job="dogs")
    stage.settle()
    stage.submit("gpu-feature-discovery", "mig-40gb")
    stage.judged()


def _fragmented(stage: Stage, cloud: Cloud) -> None:
    for number in (1, 2):
        stage.node(cloud.node(f"a100-{number}"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=5, job="dogs")
    stage.holder("birds-1-0", "a100-2", gpus=6, job="birds")
    stage.settle()
    stage.submit(cloud.preset, PROFILE, gpus=4)
    stage.judged()


for _name in ("gke", "karpenter", "gfd"):
    SITUATIONS.add(
        Situation(
            name=f"fragmented-{_name}",
            tells=f"Five GPUs are free, three at most on one node, the job wants four together; {_name}",
            make=lambda stage, cloud=CLOUDS[_name]: _fragmented(stage, cloud),  # type: ignore[misc]
            cause="Fragmented",
            detail=("5 nvidia.com/gpu are free", "3 at most"),
            hint=("gpusPerNode to 3",),
        )
    )


@SITUATIONS("Fragmented", "4 nvidia.com/gpu are free", hint=("gpusPerNode to 1",))
def fragmented_single_gpus(stage: Stage) -> None:
    """Four nodes with two cards each, one of each is taken, and the job wants two together."""
    for number in range(1, 5):
        stage.node(GFD.stranger(f"rtx-{number}", gpus=2))
    stage.settle()
    for number in range(1, 5):
        stage.holder(f"dogs-1-{number}", f"rtx-{number}", gpus=1, job=f"dogs-{number}")
    stage.settle()
    stage.submit("gpu-feature-discovery", "rtx-4090", gpus=2)
    stage.judged()


@SITUATIONS("NoSuchNode", "asks for 2", hint=("gpusPerNode to 1",))
def more_gpus_than_any_node_has(stage: Stage) -> None:
    """Free nodes with one card each, and the job wants two together."""
    for number in range(1, 4):
        stage.node(GFD.stranger(f"rtx-{number}", gpus=1))
    stage.settle()
    stage.submit("gpu-feature-discovery", "rtx-4090", gpus=2)
    stage.judged()


@SITUATIONS("InsufficientCpuOrMemory", "cpu", "a100-1", hint=("perGpu cpu",))
def cpu_short(stage: Stage) -> None:
    """Seven GPUs are free, and other pods hold the CPU."""
    stage.node(GKE.node("a100-1"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=1, job="dogs", requests={"cpu": "90"})
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.judged()


@SITUATIONS("InsufficientCpuOrMemory", "memory", "a100-1", hint=("perGpu memory",))
def memory_short(stage: Stage) -> None:
    """GPUs are free, and a pod without GPUs holds the memory."""
    stage.node(KARPENTER.node("a100-1"))
    stage.settle()
    stage.holder("database-0", "a100-1", requests={"memory": "1100Gi"})
    stage.settle()
    stage.submit("karpenter", PROFILE)
    stage.judged()


@SITUATIONS("InsufficientCpuOrMemory", "ephemeral-storage", "a100-1")
def local_disk_short(stage: Stage) -> None:
    """GPUs are free, local disk is not."""
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=1, job="dogs", requests={"ephemeral-storage": "1000Gi"})
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE)
    stage.judged()


@SITUATIONS("InsufficientCpuOrMemory", "pods", "a100-1")
def pods_short(stage: Stage) -> None:
    """The node takes no more pods."""
    stage.node(GFD.node("a100-1"), pods="2")
    stage.settle()
    stage.holder("agent-1", "a100-1")
    stage.holder("agent-2", "a100-1")
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE)
    stage.judged()


@SITUATIONS("InsufficientCpuOrMemory", "a100-2")
def cpu_short_where_gpus_are_free(stage: Stage) -> None:
    """One node is out of GPUs, the other out of CPU."""
    for number in (1, 2):
        stage.node(GKE.node(f"a100-{number}"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.holder("database-0", "a100-2", requests={"cpu": "95"})
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.judged()


@SITUATIONS("NoSuchNode", "too small even when empty", "cpu")
def cpu_larger_than_any_node(stage: Stage) -> None:
    """The profile asks for more CPU for eight GPUs than the node has."""
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, gpus=8, changed={"perGpu": {"cpu": "16"}})
    stage.judged()


@SITUATIONS("NoSuchNode", "memory")
def memory_larger_than_any_node_with_overhead(stage: Stage) -> None:
    """The runtime class's overhead makes the pod larger than the node."""
    overhead = {"podFixed": {"memory": "1100Gi"}}
    stage.make("runtimeclasses", {"metadata": {"name": "kata"}, "handler": "kata", "overhead": overhead})
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, changed={"runtimeClassName": "kata"})
    stage.judged()


@SITUATIONS("InsufficientGPU", "1 of 2 pods have a node", "team-b/dogs")
def one_of_two_placed(stage: Stage) -> None:
    """Of two pods one has a node, for the other there is no GPU."""
    for number in (1, 2):
        stage.node(GKE.node(f"a100-{number}"), silent=True, **{"ephemeral-storage": "6Ti"})
        stage.say(f"a100-{number}", "Ready", "True", reason="KubeletReady", message="kubelet is posting ready status")
    stage.settle()
    stage.holder("dogs-1-0", "a100-2", gpus=8, job="dogs")
    stage.settle()
    stage.submit("gke", PROFILE, nodes=2, gpus=8)
    stage.judged(saying="Insufficient nvidia.com/gpu")


@SITUATIONS("InsufficientGPU", "team-b/dogs")
def none_of_two_placed(stage: Stage) -> None:
    """Neither of two pods finds a GPU."""
    for number in (1, 2):
        stage.node(KARPENTER.node(f"a100-{number}"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.holder("dogs-1-1", "a100-2", gpus=8, job="dogs")
    stage.settle()
    stage.submit("karpenter", PROFILE, nodes=2)
    stage.judged()


@SITUATIONS("InsufficientGPU", "team-b/dogs")
def preemption_does_not_help(stage: Stage) -> None:
    """The job has a priority, and so has who holds the GPUs: nobody makes room."""
    for name, value in (("high", 1000), ("higher", 2000)):
        stage.make("priorityclasses", {"metadata": {"name": name}, "value": value})
    stage.node(GKE.node("a100-1"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs", priorityClassName="higher")
    stage.settle()
    stage.submit("gke", PROFILE, podOverrides={"priorityClassName": "high"})
    stage.judged()


@SITUATIONS("PreemptingOthers", "a100-1")
def preempting(stage: Stage) -> None:
    """A pod of lower priority was told to stop, and has not yet."""
    stage.make("priorityclasses", {"metadata": {"name": "high"}, "value": 1000})
    stage.node(GKE.node("a100-1"), silent=True)
    stage.say("a100-1", "Ready", "True", reason="KubeletReady", message="kubelet is posting ready status")
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.settle()
    stage.submit("gke", PROFILE, podOverrides={"priorityClassName": "high"})
    stage.kube.wait_for("pods", "cats-1-0", lambda found: found["status"].get("nominatedNodeName"), namespace="team-a")
    stage.judged()


@SITUATIONS("InsufficientGPU", "team-b/dogs")
def preferred_taint_is_no_obstacle(stage: Stage) -> None:
    """The node that fits has a taint that only discourages, and is full."""
    stage.node(GFD.node("a100-1", taints=("team=research:PreferNoSchedule",)))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE)
    stage.judged()


@SITUATIONS("InsufficientGPU", "team-b/dogs")
def full_beside_cordoned_tainted_and_other(stage: Stage) -> None:
    """One node fits and is full; another is cordoned, one is reserved, one has another GPU."""
    for spec in (GKE.node("a100-1"), GKE.node("a100-2"), GKE.node("a100-3", taints=("dedicated=x:NoSchedule",))):
        stage.node(spec)
    stage.node(GKE.stranger("h100-1"))
    stage.kube.kubectl("cordon", "a100-2")
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.settle()
    stage.submit("gke", PROFILE)
    stage.judged()


def _together(manifest: Object) -> Object:
    """Return the pod as a webhook changes it that wants it beside a cache."""
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "dataset-cache"}}}
    return merge(
        manifest, {"spec": {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}}
    )


@SITUATIONS("TaintOrSelectorMismatch", "pod affinity")
def affinity_to_a_pod_that_is_not_there(stage: Stage) -> None:
    """A webhook of the cluster wants the pod beside a cache that does not run."""
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, alter=_together)
    stage.judged()


@SITUATIONS("TaintOrSelectorMismatch", "1 of 2 pods have a node", "anti-affinity")
def two_pods_and_one_node(stage: Stage) -> None:
    """Each pod of a job wants a node of its own; there is only one node, with GPUs enough for both."""
    stage.node(GKE.node("a100-1"), silent=True)
    stage.say("a100-1", "Ready", "True", reason="KubeletReady", message="kubelet is posting ready status")
    stage.node(GKE.stranger("h100-1"))
    stage.settle()
    stage.submit("gke", PROFILE, nodes=2)
    stage.judged(saying="anti-affinity")
