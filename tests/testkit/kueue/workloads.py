"""Reading Kueue's Workload, the object that stands for a pod or a group of pods in a queue. Pure."""

from __future__ import annotations

from testkit.kube import Object, condition


def admitted(workload: Object) -> bool:
    """Whether it has its quota and its pods may start."""
    return _is_true(workload, "Admitted")


def waiting(workload: Object) -> bool:
    """Whether Kueue has looked at it and found no room: it says why in the condition QuotaReserved."""
    found = condition(workload, "QuotaReserved")
    return found.get("status") == "False" and bool(found.get("message"))


def evicted(workload: Object) -> bool:
    """Whether its quota was taken away, until it is admitted again."""
    return _is_true(workload, "Evicted")


def _is_true(workload: Object, kind: str) -> bool:
    return bool(condition(workload, kind).get("status") == "True")
