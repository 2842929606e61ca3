"""Builders of Kueue's objects. Pure: the least that Kueue accepts, the rest is its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testkit.kube import Object

API = "kueue.x-k8s.io/v1beta2"


def resource_flavor(
    name: str, *, labels: Mapping[str, str] | None = None, tolerations: list[Mapping[str, Any]] | None = None
) -> Object:
    """Return a kind of node: pods admitted to it are given `labels` as their node selector, and the tolerations."""
    spec: Object = {}
    if labels:
        spec["nodeLabels"] = dict(labels)
    if tolerations:
        spec["tolerations"] = [dict(entry) for entry in tolerations]
    return _object("ResourceFlavor", name, spec)


def cluster_queue(
    name: str, *, flavor: str, quota: Mapping[str, str | int], preempts: bool = True, cohort: str = ""
) -> Object:
    """Return a quota, open to the queues of every namespace.

    Kueue never admits a pod that requests a resource for which `quota` has no entry. With `preempts`, a workload of
    higher priority takes the place of one of lower priority.
    """
    resources = [{"name": resource, "nominalQuota": str(amount)} for resource, amount in quota.items()]
    spec: Object = {
        "namespaceSelector": {},
        "resourceGroups": [
            {"coveredResources": list(quota), "flavors": [{"name": flavor, "resources": resources}]},
        ],
        "preemption": {"withinClusterQueue": "LowerPriority" if preempts else "Never"},
    }
    if cohort:
        spec["cohortName"] = cohort
    return _object("ClusterQueue", name, spec)


def local_queue(name: str, *, cluster_queue: str) -> Object:
    """Return a queue of one namespace: what pods name in their label. Its namespace is given when it is applied."""
    return _object("LocalQueue", name, {"clusterQueue": cluster_queue})


def priority_class(name: str, *, value: int) -> Object:
    """Return a priority in the queue, which is not the pod's priority on its node."""
    return {"apiVersion": API, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": value}


def _object(kind: str, name: str, spec: Object) -> Object:
    return {"apiVersion": API, "kind": kind, "metadata": {"name": name}, "spec": spec}
