"""What else is in the cluster, as far as it explains why pods wait; kept small, because there may be much of it."""

from __future__ import annotations

from typing import Any

from diffusion_api import names
from diffusion_operator.state import Object

PLACED_PODS = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"
"""Field selector of the pods that hold something of a node."""
CLAIM_EVENTS = "involvedObject.kind=NodeClaim"
"""Field selector of the events about machines that Karpenter could not get."""


def node(raw: Object) -> Object:
    """Return a node without what does not decide about placing; its list of images alone is many kilobytes."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    return {
        "metadata": _some(metadata, "name", "labels", "creationTimestamp"),
        "spec": _some(spec, "taints", "unschedulable"),
        "status": _some(status, "allocatable", "conditions"),
    }


def placed_pod(raw: Object) -> Object:
    """Return a pod as far as it says who holds how much of which node."""
    metadata, spec = raw["metadata"], raw.get("spec") or {}
    job = (metadata.get("labels") or {}).get(names.LABEL_JOB_NAME)
    return {
        "metadata": _some(metadata, "name", "namespace", "uid")
        | ({"labels": {names.LABEL_JOB_NAME: job}} if job else {}),
        "spec": _some(spec, "nodeName", "overhead")
        | {
            kind: [_some(entry, "resources", "restartPolicy") for entry in spec.get(kind) or ()] for kind in _CONTAINERS
        },
        "status": _some(raw.get("status") or {}, "phase"),
    }


def workload(raw: Object) -> Object:
    """Return a Workload as far as it says why it waits and who is before it; its pod templates are most of it."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    return {
        "metadata": _some(metadata, "name", "namespace", "uid", "creationTimestamp"),
        "spec": _some(spec, "queueName", "priority", "active"),
        "status": _some(status, "conditions", "admissionChecks"),
    }


_CONTAINERS = ("containers", "initContainers")


def _some(value: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value[key] for key in keys if key in value}
