"""What a machine must offer for a local cluster, asked before anything is started. Each lack is one sentence."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from testkit.cluster import spec
from testkit.cluster.cgroups import Hierarchies
from testkit.tools import distribution

PACKAGES = ("util-linux", "iproute2", "iptables", "conntrack", "openssl")
INSTEAD = "Or run against another cluster with CLUSTER=current, or set DIFFUSION_OPERATOR_SKIP_CLUSTER=1 to skip."


class MachineUnfitError(RuntimeError):
    """This machine cannot run the local cluster; the message says what it lacks and what to do."""


def require() -> None:
    """Raise `MachineUnfitError` with everything that is lacking. Installs packages where it may."""
    problems = lacking()
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
    names = {mount.name for mount in found.mounts}
    needed = {"cpu", "cpuset", "memory", "pids"} if found.version == 1 else set()
    # Two controllers may share one hierarchy, under a name like cpu,cpuacct.
    absent = sorted(name for name in needed if not any(name in mounted.split(",") for mounted in names))
    if absent:
        return [f"it needs the control group controllers {', '.join(absent)}: mount them below /sys/fs/cgroup"]
    return []


def _routes() -> list[str]:
    done = subprocess.run(["ip", "-json", "route", "show", "table", "main"], capture_output=True, text=True, check=True)
    # Our own link, left by a cluster whose starter was killed, goes before the next starts.
    return [
        route["dst"]
        for route in json.loads(done.stdout or "[]")
        if route["dst"] != "default" and route.get("dev") != spec.HOST_LINK
    ]
