"""What a machine must offer for a local cluster, asked before anything is started. Each lack is one sentence."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from testkit.cluster import spec
from testkit.cluster.cgroups import Hierarchies
from testkit.tools import distribution

PACKAGES = ("util-linux", "iproute2", "iptables", "conntrack", "openssl")
_SOCKET_NAME = 108  # bytes, with the zero at the end
_CONTROLLERS = {"cpu", "cpuset", "memory", "pids"}
INSTEAD = "Or run against another cluster with CLUSTER=current, or set DIFFUSION_OPERATOR_SKIP_CLUSTER=1 to skip."


class MachineUnfitError(RuntimeError):
    """This machine cannot run the local cluster; the message says what it lacks and what to do."""


def require(folder: Path) -> None:
    """Raise `MachineUnfitError` with everything that is lacking for a cluster with its state in `folder`.

    Installs packages where it may.
    """
    problems = lacking() + path_problems(folder) + environment_problems(Path(sys.prefix))
    if problems:
        raise MachineUnfitError("\n".join(["no local cluster can run here:", *(f"- {p}" for p in problems), INSTEAD]))


def lacking() -> list[str]:
    """Return what is lacking, one sentence each with the remedy."""
    if sys.platform != "linux":
        return [f"it needs Linux, and this is {sys.platform}: use a Linux machine or virtual machine"]
    if os.geteuid() != 0:
        return ["it needs root for namespaces, mounts and control groups: run with sudo"]
    problems = group_problems(Hierarchies.of_machine())
    try:
        distribution.require(PACKAGES, purpose="the local cluster")
    except distribution.MissingPackagesError as error:
        return [*problems, str(error)]
    probe = subprocess.run(
        [
            "unshare",
            "--net",
            "--mount",
            "sh",
            "-c",
            "ip link add name probe0 type bridge && ip link add name probe1 type veth peer name probe2",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        reason = probe.stderr.strip() or f"exit {probe.returncode}"
        problems.append(
            f"it needs network and mount namespaces with bridge and veth devices, and making them failed ({reason}): "
            "use a machine whose kernel has them, or a container with --privileged"
        )
    return problems + overlaps(_routes())


def path_problems(folder: Path) -> list[str]:
    """Return a sentence when sockets below `folder` would have longer names than the kernel takes. Pure."""
    longest = f"{folder}/nodes/{spec.MAX_NODES}/kubelet/device-plugins/kubelet.sock"
    if len(longest) < _SOCKET_NAME:
        return []
    excess = len(longest) - _SOCKET_NAME + 1
    return [f"its state folder {folder} is {excess} characters too long for sockets: shorten DIFFUSION_OPERATOR_CACHE"]


def environment_problems(prefix: Path) -> list[str]:
    """Return a sentence when pods, which have a /tmp of their own, could not see this Python environment. Pure."""
    if Path("/tmp") not in prefix.parents:
        return []
    return [
        f"pods would not see the Python environment {prefix}: set DIFFUSION_OPERATOR_CACHE to a folder outside /tmp"
    ]


def overlaps(routes: Sequence[str]) -> list[str]:
    """Return a sentence for each of the machine's networks that the cluster's addresses would hide. Pure."""
    problems = []
    for wanted in map(ipaddress.ip_network, spec.RANGES):
        for route in routes:
            network = ipaddress.ip_network(route, strict=False)
            if network.version == wanted.version and network.prefixlen and network.overlaps(wanted):
                problems.append(
                    f"the cluster's addresses {wanted} collide with this machine's network {network}: "
                    "take that network down for as long as the cluster runs"
                )
    return problems


def group_problems(found: Hierarchies) -> list[str]:
    if not found.mounts:
        return ["it needs control groups, and none are mounted at /sys/fs/cgroup: mount cgroup2 there"]
    closed = [str(mount) for mount in found.mounts if not os.access(mount, os.W_OK)]
    if closed:
        return [f"it needs to make control groups, and cannot write to {', '.join(closed)}: remount them read-write"]
    if found.version == 1:
        # Two controllers may share one hierarchy, under a name like cpu,cpuacct.
        offered = {name for mount in found.mounts for name in mount.name.split(",")}
    else:
        offered = set((found.mounts[0] / "cgroup.controllers").read_text().split())
    absent = sorted(_CONTROLLERS - offered)
    if absent:
        return [f"it needs the control group controllers {', '.join(absent)}: mount or delegate them at /sys/fs/cgroup"]
    return []


def _routes() -> list[str]:
    done = subprocess.run(["ip", "-json", "route", "show", "table", "main"], capture_output=True, text=True, check=True)
    # Our own link, left by a cluster whose starter was killed, goes before the next starts.
    return [
        route["dst"]
        for route in json.loads(done.stdout or "[]")
        if route["dst"] != "default" and route.get("dev") != spec.HOST_LINK
    ]
