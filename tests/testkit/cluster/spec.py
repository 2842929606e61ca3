"""What a cluster is asked to be, and which addresses it gives to what. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Everything lives in one private network namespace; the machine reaches it through one link.
HOST_ADDRESS = "10.244.254.1"  # of the machine, as pods see it
LINK_ADDRESS = "10.244.254.2"  # the other end of the link
CONTROL_ADDRESS = "10.244.255.1"  # of the API server and the DNS server
API_PORT = 6443
RANGES = ("10.244.0.0/16", "10.96.0.0/16")  # pods and nodes; services
HOST_LINK = "dop-cluster"
MAX_NODES = 100
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")
_TAINT = re.compile(r"([^=:]+)(?:=([^:]*))?:(NoSchedule|PreferNoSchedule|NoExecute)")


@dataclass(frozen=True, kw_only=True)
class Taint:
    """A taint of a node."""

    key: str
    value: str
    effect: str

    @classmethod
    def parse(cls, text: str) -> Taint:
        """Read kubectl's notation `key=value:Effect` or `key:Effect`."""
        found = _TAINT.fullmatch(text)
        if found is None:
            raise ValueError(f"taint {text!r} is not like key=value:NoSchedule: mend it")
        return cls(key=found[1], value=found[2] or "", effect=found[3])


@dataclass(frozen=True)
class NodeSpec:
    """A node: its GPUs are an extended resource, and its labels and taints are what a cloud would set.

    `cpu` (cores) and `memory_gib` make the node smaller than the machine; None offers all of it. They cannot exceed the
    machine, because a real kubelet admits the pods.
    """

    name: str
    gpus: int = field(default=0, kw_only=True)
    gpu_resource: str = field(default="nvidia.com/gpu", kw_only=True)
    labels: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    taints: Sequence[str] = field(default=(), kw_only=True)
    cpu: int | None = field(default=None, kw_only=True)
    memory_gib: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if _DNS_LABEL.fullmatch(self.name) is None:
            raise ValueError(f"node name {self.name!r}: use lower-case letters, digits and dashes, at most 42")
        for taint in self.taints:
            Taint.parse(taint)

    @property
    def parsed_taints(self) -> list[Taint]:
        """The taints, read."""
        return [Taint.parse(taint) for taint in self.taints]


@dataclass(frozen=True, kw_only=True)
class Addressing:
    """The addresses of the node with a given number, from 1."""

    index: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= MAX_NODES:
            raise ValueError(f"node number {self.index}: a local cluster has room for {MAX_NODES} nodes")

    @property
    def node(self) -> str:
        """The node's own address."""
        return f"10.244.255.{self.index + 10}"

    @property
    def pods(self) -> str:
        """The range of its pods."""
        return f"10.244.{self.index}.0/24"

    @property
    def bridge(self) -> str:
        """The bridge that its pods hang on, within the network namespace."""
        return f"node{self.index}"


def default_nodes() -> list[NodeSpec]:
    """Return the nodes that the end to end tests and `up` use: one without GPUs, two with A100s, one with RTX 4090s."""
    present = ("nvidia.com/gpu=present:NoSchedule",)
    a100 = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB", "nvidia.com/gpu.memory": "81920"}
    rtx = {"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-4090", "nvidia.com/gpu.memory": "24564"}
    return [
        NodeSpec("cpu-1"),
        NodeSpec("a100-1", gpus=2, labels=a100, taints=present),
        NodeSpec("a100-2", gpus=2, labels=a100, taints=present),
        NodeSpec("rtx-1", gpus=2, labels=rtx),
    ]
