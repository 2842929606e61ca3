"""kube-scheduler's and the autoscaler's sentences, taken apart.

`0/4 nodes are available: 1 Insufficient nvidia.com/gpu, 3 node(s) had untolerated taint(s). preemption: 0/4 nodes ...`
(FitError.Error of kube-scheduler). Since 1.36 the taint is no longer named. Each node is counted under the first filter
that refuses it: cordon, name, taints, affinity, ports, resources, volumes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INSUFFICIENT = "Insufficient "
TOO_MANY_PODS = "Too many pods"
UNSCHEDULABLE = "node(s) were unschedulable"
SELECTOR = ("didn't match Pod's node affinity", "didn't match node selector", "didn't match scheduler-enforced node")
TAINT = ("untolerated taint", "had taint", "had taints that the pod didn't tolerate")
OTHER_PODS = (
    "pod anti-affinity",
    "pod affinity rules",
    "pods anti-affinity",
    "pod topology spread",
    "free ports for the requested pod ports",
)
VOLUME_ZONE = ("volume node affinity conflict", "PersistentVolume's node affinity", "no available volume zone")
VOLUME = (
    "unbound immediate PersistentVolumeClaims",
    "available persistent volumes to bind",
    "enough free storage",
    "bound to non-existent",
    "persistentvolumeclaim",
    "max volume count",
)

_SCHEDULER = re.compile(r"\d{1,9}/(\d{1,9}) nodes are available:?(.*)", re.DOTALL)
_PREEMPTION = re.compile(r"[.\s]*(?:preemption:|no new claims to deallocate|$)", re.DOTALL)
_COUNTED = re.compile(r"(?:^|, )(\d{1,9}) (?=\D)")
_AUTOSCALER = re.compile(r"^[Pp]od didn't trigger scale-up(?: \([^)]*\))?:?\s*(.*)$", re.DOTALL)


@dataclass(frozen=True)
class Reason:
    """How many nodes (or node groups) were refused, and why."""

    count: int
    why: str

    def says(self, *words: str) -> bool:
        """Return whether it speaks of one of these."""
        return any(word in self.why for word in words)


def scheduler(message: str) -> list[Reason]:
    """Return kube-scheduler's reasons; one of count 0 with everything where there are no counts, e.g. about claims."""
    match = _SCHEDULER.search(message)
    if match is None:
        return [Reason(0, message.strip())] if message.strip() else []
    return _reasons(_PREEMPTION.split(match[2], maxsplit=1)[0])


def autoscaler(message: str) -> list[Reason]:
    """Return the cluster autoscaler's reasons, one per kind of node group."""
    match = _AUTOSCALER.match(message.strip())
    return _reasons(match[1]) if match is not None else []


def _reasons(said: str) -> list[Reason]:
    body = said.strip().rstrip(".")
    if not body:
        return []
    parts = _COUNTED.split(body)
    found = [Reason(0, parts[0].strip(" ,."))] if parts[0].strip(" ,.") else []
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return found + [Reason(int(count), why.strip(" ,.")) for count, why in pairs]


def taint_in(reason: Reason) -> str:
    """Return the taint that an older scheduler names, as kubectl writes it; empty where it names none."""
    match = re.search(r"taint \{([^}:]{1,317})(?::\s*([^}]*))?\}", reason.why)
    if match is None:
        return ""
    return f"{match[1]}={match[2].strip()}" if match[2] and match[2].strip() else match[1]
