"""Objects for tests: plain dictionaries as an API server returns them, each with sane defaults and a few words to vary.

make_job(name="cats", suspend=True)
make_pod(make_job(), phase="Failed", exit_code=1)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from diffusion_api import names
from diffusion_api.run import LastWord, ProgressReport
from diffusion_api.status import LatestCheckpoint, Progress

Object = dict[str, Any]

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
"""The instant that tests call now."""


def at(seconds: float = 0) -> str:
    """Return an instant relative to NOW as the API writes it."""
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Object:
    """Return `base` with `changes` merged in, section by section; None removes."""
    merged = dict(copy.deepcopy(base))
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def make_job(
    *,
    name: str = "cats",
    namespace: str = "team-a",
    uid: str = "0d9c3a52-6a1e-4a4e-9d0e-5c1f2b3a4d5e",
    status: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **spec: Any,
) -> Object:
    """Return a job; `spec` is merged into a minimal valid one, in camelCase."""
    minimal: Object = {
        "method": "LoRA",
        "model": {"source": "s3://models/sd-v1-5/"},
        "dataset": {"source": "s3://team-a/cats/"},
        "output": {"destination": "s3://team-a/models/cats/"},
        "resources": {"profile": "a100-80gb"},
    }
    job: Object = {
        "apiVersion": names.API_VERSION,
        "kind": names.JOB_KIND,
        "metadata": merge(
            {"name": name, "namespace": namespace, "uid": uid, "generation": 1, "resourceVersion": "1"}, metadata or {}
        ),
        "spec": merge(minimal, spec),
    }
    return job | ({"status": dict(status)} if status is not None else {})


def make_profile(*, name: str = "a100-80gb", **spec: Any) -> Object:
    """Return a profile of one GPU class."""
    base: Object = {
        "resourceName": "nvidia.com/gpu",
        "memoryGiB": 80,
        "nodeAffinity": [
            {"key": "nvidia.com/gpu.product", "values": ["NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"]}
        ],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "spot": {
            "nodeSelector": {"cloud.google.com/gke-spot": "true"},
            "tolerations": [{"key": "cloud.google.com/gke-spot", "value": "true", "effect": "NoSchedule"}],
        },
        "perGpu": {"cpu": "8", "memory": "64Gi", "ephemeralStorage": "200Gi"},
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.PROFILE_KIND,
        "metadata": {"name": name, "uid": f"profile-{name}", "resourceVersion": "1"},
        "spec": merge(base, spec),
    }


def make_pod(
    job: Mapping[str, Any],
    *,
    attempt: int = 1,
    rank: int = 0,
    phase: str = "Pending",
    node: str = "",
    status: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Object:
    """Return a pod of a job as an API server shows it; `terminated` adds how it ended. Attempt 0: a preflight."""
    owner = job["metadata"]
    name = names.pod_name(owner["name"], attempt, rank) if attempt else names.preflight_name(owner["name"], rank)
    labels = {
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_JOB_NAME: owner["name"],
        names.LABEL_JOB_UID: owner["uid"],
        names.LABEL_ATTEMPT: str(attempt),
        names.LABEL_RANK: str(rank),
    }
    reference = {
        "apiVersion": names.API_VERSION,
        "kind": names.JOB_KIND,
        "name": owner["name"],
        "uid": owner["uid"],
        "controller": True,
    }
    base: Object = {
        "name": name,
        "namespace": owner["namespace"],
        "uid": f"{owner['uid'][:8]}-pod-{attempt}-{rank}",
        "resourceVersion": "10",
        "labels": labels,
        "ownerReferences": [reference],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": merge(base, metadata or {}),
        "spec": {"nodeName": node} if node else {},
        "status": merge({"phase": phase} | ({"startTime": at(-100)} if node else {}), status or {}),
    }


def make_node(name: str, *taints: str, ready: str = "True", taint_added: float = 0) -> Object:
    """Return a node with taints, written like `key=value:Effect`; those with NoExecute say when they were added."""
    entries = []
    for text in taints:
        mark, _, effect = text.rpartition(":")
        key, _, value = mark.partition("=")
        entry = {"key": key, "effect": effect} | ({"value": value} if value else {})
        entries.append(entry | ({"timeAdded": at(taint_added)} if effect == "NoExecute" else {}))
    conditions = [{"type": "Ready", "status": ready, "reason": "", "message": ""}]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "uid": f"node-{name}", "resourceVersion": "5"},
        "spec": {"taints": entries} if entries else {},
        "status": {"conditions": conditions},
    }


def container(**state: Any) -> Object:
    """Return the part of a pod's status with the trainer's container in a state: waiting, running or terminated."""
    return {"containerStatuses": [{"name": names.TRAINER_CONTAINER, "state": state}]}


def terminated(exit_code: int, *, message: str = "", reason: str = "", finished: float = 0) -> Object:
    """Return the part of a pod's status that says how the trainer's container ended."""
    return container(
        terminated={
            "exitCode": exit_code,
            "message": message,
            "reason": reason or ("Completed" if exit_code == 0 else "Error"),
            "finishedAt": at(finished),
        }
    )


def disrupted(reason: str, message: str = "making room") -> Object:
    """Return the part of a pod's status that says that it was disrupted."""
    return {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}]}


def deleting(*, asked: float = -5, grace: float = 120) -> Object:
    """Return the part of a pod's metadata that says that its deletion was asked for."""
    return {"deletionTimestamp": at(asked + grace), "deletionGracePeriodSeconds": grace}


def last_word(exit_code: int, *, attempt: int = 1, message: str = "as the trainer says", **more: Any) -> str:
    """Return a termination message."""
    return LastWord(attempt=attempt, exit_code=exit_code, message=message, **more).to_message()


def make_progress(step: int, *, total: int = 2000, time: str | None = None, **more: Any) -> Progress:
    """Return progress at a step."""
    return Progress(step=step, total_steps=total, last_updated_time=time or at(), **more)


def make_checkpoint(step: int, *, time: str | None = None) -> LatestCheckpoint:
    """Return an acknowledged checkpoint at a step."""
    return LatestCheckpoint(step=step, uri=f"s3://team-a/models/cats/checkpoints/{step}/", time=time or at())


def make_report(step: int, *, attempt: int = 1, stage: str = "Running", **more: Any) -> ProgressReport:
    """Return what a trainer answers when asked for its progress."""
    content = {"attempt": attempt, "stage": stage, "progress": make_progress(step), "time": at()} | more
    return ProgressReport.model_validate(content)
