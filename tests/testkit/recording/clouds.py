"""GPU nodes as five clouds make them: labels, taints and sizes, and what differs on a node that is not for the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from testkit.cluster import NodeSpec

PROFILE = "a100-80gb"


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """How a cloud marks its nodes with eight A100 of 80 GB, for which its preset's profile a100-80gb is."""

    preset: str
    labels: Mapping[str, str]
    taint: str
    other: Mapping[str, str]
    """Labels of a node with another GPU."""
    asks: str
    """The label by which it differs."""
    spot: Mapping[str, str] = field(default_factory=dict)

    def node(self, name: str, *, gpus: int = 8, taints: tuple[str, ...] = ()) -> NodeSpec:
        """Return a node for the profile."""
        return NodeSpec(name, gpus=gpus, labels=self.labels, taints=(self.taint, *taints), cpu=96, memory_gib=1152)

    def stranger(self, name: str, *, gpus: int = 8) -> NodeSpec:
        """Return a node with another GPU."""
        labels = {**self.labels, **self.other}
        return NodeSpec(name, gpus=gpus, labels=labels, taints=(self.taint,), cpu=96, memory_gib=1152)


def _karpenter(prefix: str) -> dict[str, str]:
    return {
        f"{prefix}/instance-gpu-name": "a100",
        f"{prefix}/instance-gpu-memory": "81920",
        f"{prefix}/instance-gpu-count": "8",
        f"{prefix}/instance-gpu-manufacturer": "nvidia",
        "karpenter.sh/capacity-type": "on-demand",
        "karpenter.sh/nodepool": "gpu",
        "node.kubernetes.io/instance-type": "p4de.24xlarge",
    }


GKE = Cloud(
    preset="gke",
    labels={
        "cloud.google.com/gke-accelerator": "nvidia-a100-80gb",
        "cloud.google.com/gke-nodepool": "a100",
        "cloud.google.com/gke-gpu-driver-version": "default",
    },
    taint="nvidia.com/gpu=present:NoSchedule",
    other={"cloud.google.com/gke-accelerator": "nvidia-h100-80gb", "cloud.google.com/gke-nodepool": "h100"},
    asks="cloud.google.com/gke-accelerator",
    spot={"cloud.google.com/gke-spot": "true", "cloud.google.com/gke-provisioning": "spot"},
)
EKS = Cloud(
    preset="eks-managed-node-groups",
    labels={
        "node.kubernetes.io/instance-type": "p4de.24xlarge",
        "eks.amazonaws.com/capacityType": "ON_DEMAND",
        "eks.amazonaws.com/nodegroup": "a100",
        "nvidia.com/gpu.present": "true",
    },
    taint="nvidia.com/gpu=true:NoSchedule",
    other={"node.kubernetes.io/instance-type": "g5.48xlarge", "eks.amazonaws.com/nodegroup": "a10g"},
    asks="node.kubernetes.io/instance-type",
    spot={"eks.amazonaws.com/capacityType": "SPOT"},
)
KARPENTER = Cloud(
    preset="karpenter",
    labels=_karpenter("karpenter.k8s.aws"),
    taint="nvidia.com/gpu=true:NoSchedule",
    other={"karpenter.k8s.aws/instance-gpu-memory": "40960", "node.kubernetes.io/instance-type": "p4d.24xlarge"},
    asks="karpenter.k8s.aws/instance-gpu-memory",
    spot={"karpenter.sh/capacity-type": "spot"},
)
AUTO = Cloud(
    preset="eks-auto-mode",
    labels=_karpenter("eks.amazonaws.com"),
    taint="nvidia.com/gpu=true:NoSchedule",
    other={"eks.amazonaws.com/instance-gpu-name": "h100", "node.kubernetes.io/instance-type": "p5.48xlarge"},
    asks="eks.amazonaws.com/instance-gpu-name",
    spot={"karpenter.sh/capacity-type": "spot"},
)
GFD = Cloud(
    preset="gpu-feature-discovery",
    labels={
        "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
        "nvidia.com/gpu.memory": "81920",
        "nvidia.com/gpu.family": "ampere",
        "nvidia.com/gpu.present": "true",
        "nvidia.com/gpu.sharing-strategy": "none",
        "nvidia.com/mig.strategy": "none",
    },
    taint="nvidia.com/gpu=present:NoSchedule",
    other={"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-4090", "nvidia.com/gpu.memory": "24564"},
    asks="nvidia.com/gpu.product",
)
CLOUDS = {"gke": GKE, "eks": EKS, "karpenter": KARPENTER, "auto": AUTO, "gfd": GFD}
CPU = NodeSpec("cpu-1", cpu=16, memory_gib=64)
