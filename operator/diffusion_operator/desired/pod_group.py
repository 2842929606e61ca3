"""What makes an attempt's pods one pod group of Kueue, a single pod too; the rules are in docs/reference/kueue.md."""

from __future__ import annotations

import hashlib
import json

from diffusion_api import names
from diffusion_api.job import JobSpec
from diffusion_operator.state import Job, Object

SCHEDULERS = (
    names.KUEUE_PREFIX,
    "scheduling.x-k8s.io/",
    "scheduling.k8s.io/",
    "scheduling.volcano.sh/",
    "volcano.sh/",
    "kai.scheduler/",
)
"""Beginnings of labels and annotations that speak to queues and gang schedulers."""
HOSTNAME = "kubernetes.io/hostname"


def asked(job: Job, spec: JobSpec) -> dict[str, str]:
    """Return the labels by which the job asks for a queue; empty where it asks for none.

    They stand on the job, as everywhere with Kueue; `podOverrides.labels` count where the job itself has none.
    """
    given = job.metadata.get("labels") or {}
    keys = (names.LABEL_QUEUE, names.LABEL_QUEUE_PRIORITY)
    found = {key: value for key in keys if (value := given.get(key) or spec.pod_overrides.labels.get(key))}
    return found if names.LABEL_QUEUE in found else {}


def join(pods: tuple[Object, ...], labels: dict[str, str], *, workload: str) -> tuple[Object, ...]:
    """Return the pods of one attempt as one group; `workload` is its name."""
    return tuple(_joined(pod, labels, workload=workload, total=len(pods)) for pod in pods)


def _joined(pod: Object, labels: dict[str, str], *, workload: str, total: int) -> Object:
    metadata = pod["metadata"]
    marks = {names.ANNOTATION_POD_GROUP_COUNT: str(total), names.ANNOTATION_POD_GROUP_ROLE: role(pod)}
    metadata = metadata | {
        "labels": metadata["labels"] | labels | {names.LABEL_POD_GROUP: workload},
        "annotations": metadata["annotations"] | marks,
    }
    return pod | {"metadata": metadata}


def role(pod: Object) -> str:
    """Return what pods of a group have in common that may stand for each other.

    Kueue's own is a hash of the whole spec, so that a replacement that avoids a node would never start. What decides
    about quota and flavor is in it: a pod with other requests or for other nodes is not charged for its predecessor's.
    """
    spec = pod["spec"]
    shape = {
        "resources": [container["resources"] for container in spec["containers"]],
        "nodeSelector": spec.get("nodeSelector"),
        "tolerations": spec.get("tolerations"),
        "runtimeClassName": spec.get("runtimeClassName"),
        "terms": [_kinds_of_node(term) for term in _terms(spec)],
    }
    return f"rank-{hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:8]}"


def _terms(spec: Object) -> list[Object]:
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    found: list[Object] = required.get("nodeSelectorTerms") or []
    return found


def _kinds_of_node(term: Object) -> list[Object]:
    """Return what the term says of kinds of nodes; which single ones are avoided changes from attempt to attempt."""
    return [entry for entry in term.get("matchExpressions") or [] if entry["key"] != HOSTNAME]


def alone(marks: dict[str, str]) -> dict[str, str]:
    """Return labels or annotations without what speaks to queues and gangs: for a pod that is part of neither."""
    return {key: value for key, value in marks.items() if not key.startswith(SCHEDULERS)}
