"""Configuration files of a node's programs. Pure: from a specification to text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from testkit.cluster import cgroups
from testkit.cluster.spec import CONTROL_ADDRESS, Addressing, NodeSpec
from testkit.pki import KeyPair

PAUSE = "docker.io/testkit/pause:1"
# A lost node is noticed after the controller manager's grace period; heartbeats come with a quarter of the lease.
LEASE_SECONDS = 8
GRACE_SECONDS = 10


class NodeTooLargeError(ValueError):
    """A node asks for more than the machine has."""


def containerd(folder: Path, *, programs: Mapping[str, Path]) -> str:
    """Return containerd's configuration for the node in `folder`."""
    plugins = json.dumps(sorted({str(programs[name].parent) for name in ("bridge", "host-local", "loopback")}))
    return f"""\
version = 3
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.internal.v1.opt']
  path = "{folder}/opt"
[plugins.'io.containerd.cri.v1.images']
  # Layers hold nothing, so copying them is free, and works on file systems that overlays do not.
  snapshotter = "native"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE}"
[plugins.'io.containerd.cri.v1.runtime']
  # Many sandboxes lack CAP_SYS_RESOURCE; without this every pod dies there with an error that does not say so.
  restrict_oom_score_adj = true
  ignore_rdt_not_enabled_errors = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = {plugins}
  conf_dir = "{folder}/cni"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  base_runtime_spec = "{folder}/base-spec.json"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = "{programs["runc"]}"
  SystemdCgroup = false
"""


def cni(folder: Path, *, addressing: Addressing) -> str:
    """Return the pod network of a node: a bridge with a range of its own."""
    bridge = {
        "type": "bridge",
        "bridge": addressing.bridge,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(folder / "ipam"),
            "ranges": [[{"subnet": addressing.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return json.dumps({"cniVersion": "1.0.0", "name": addressing.bridge, "plugins": [bridge]})


def kubelet(spec: NodeSpec, *, folder: Path, addressing: Addressing, authority: Path, serving: KeyPair) -> str:
    """Return the kubelet's configuration; JSON, which is YAML."""
    plenty = {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"}
    document = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority)},
        },
        "authorization": {"mode": "Webhook"},
        "address": addressing.node,
        "port": 10250,
        "healthzPort": 0,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroups.ROOT}/{group(spec)}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDomain": "cluster.local",
        "clusterDNS": [CONTROL_ADDRESS],
        "containerRuntimeEndpoint": f"unix://{folder}/containerd.sock",
        "tlsCertFile": str(serving.certificate),
        "tlsPrivateKeyFile": str(serving.key),
        "resolvConf": "/dev/null",
        "podLogsDir": str(folder / "pod-logs"),
        "nodeStatusUpdateFrequency": "2s",
        "nodeLeaseDurationSeconds": LEASE_SECONDS,
        "systemReserved": reserved(spec, cores=os.cpu_count() or 1, memory_gib=memory_gib()),
        "registerWithTaints": [
            {"key": taint.key, "value": taint.value, "effect": taint.effect} for taint in spec.parsed_taints
        ],
        # All nodes share the machine's disk and memory: none of them may throw pods out because of the others.
        "evictionHard": plenty,
        "imageGCHighThresholdPercent": 100,
    }
    return json.dumps(document, indent=1)


def group(spec: NodeSpec) -> str:
    """Return the control group of a node, below the cluster's."""
    return f"nodes/{spec.name}"


def memory_gib() -> float:
    """Return this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def reserved(spec: NodeSpec, *, cores: int, memory_gib: float) -> dict[str, str]:
    """Return what the kubelet sets aside so that the node offers just what `spec` says."""
    if (spec.cpu or 0) > cores or (spec.memory_gib or 0) > memory_gib:
        raise NodeTooLargeError(
            f"node {spec.name} asks for {spec.cpu or cores} cores and {spec.memory_gib or 0} GiB, but this machine has "
            f"{cores} and {memory_gib:.0f}: ask for less, or leave cpu and memory_gib out"
        )
    aside: dict[str, str] = {}
    if spec.cpu is not None and spec.cpu < cores:
        aside["cpu"] = str(cores - spec.cpu)
    if spec.memory_gib is not None:
        aside["memory"] = f"{int((memory_gib - spec.memory_gib) * 1024)}Mi"
    return aside


def corefile(kubeconfig: Path) -> str:
    """Return the DNS server's configuration."""
    # ttl 0: a pod's address is looked up right after the pod was made, and a remembered "no" would last.
    return f"""\
.:53 {{
  bind {CONTROL_ADDRESS}
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig}
    ttl 0
  }}
}}
"""
