"""Pods that Pod Security `restricted` admits, for tests of the cluster and of what runs on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from testkit.kube import Object

RESTRICTED: Mapping[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
GPU_TOLERATION: Mapping[str, Any] = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def pod(
    name: str,
    *,
    image: str,
    args: Sequence[str] = (),
    gpus: int = 0,
    labels: Mapping[str, str] | None = None,
    finalizers: Sequence[str] = (),
    mounts: Sequence[Mapping[str, Any]] = (),
    **spec: Any,
) -> Object:
    """Return a pod with one container `main` that is not restarted; `spec` holds further fields of its spec.

    `finalizers` keep the object after its end, so that a test can read how it ended.
    """
    container: Object = {"name": "main", "image": image, "args": list(args), "securityContext": dict(RESTRICTED)}
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(gpus)}}
        spec.setdefault("tolerations", [dict(GPU_TOLERATION)])
    if mounts:
        container["volumeMounts"] = [dict(mount) for mount in mounts]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": dict(labels or {}), "finalizers": list(finalizers)},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 10,
            "containers": [container],
            **spec,
        },
    }


def ending(found: Object) -> Object:
    """Return how the pod's container ended (exitCode, reason, message); {} while it has not."""
    statuses = found.get("status", {}).get("containerStatuses") or [{}]
    terminated: Object = statuses[0].get("state", {}).get("terminated", {})
    return terminated
