"""Whether a node is one for a pod: labels, taints, readiness. As kube-scheduler judges it (v1.36)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from diffusion_operator.policies.waiting import reading

CORDON = "node.kubernetes.io/unschedulable"
NOT_READY = frozenset(
    {
        "node.kubernetes.io/not-ready",
        "node.kubernetes.io/unreachable",
        "node.kubernetes.io/network-unavailable",
        "node.kubernetes.io/memory-pressure",
        "node.kubernetes.io/disk-pressure",
        "node.kubernetes.io/pid-pressure",
        "node.kubernetes.io/out-of-service",
    }
)
"""Taints by which Kubernetes itself says that a node is not well."""
LEAVING = frozenset(
    {
        CORDON,
        "ToBeDeletedByClusterAutoscaler",
        "karpenter.sh/disrupted",
        "karpenter.sh/disruption",
        "cloud.google.com/impending-node-termination",
        "aws-node-termination-handler/spot-itn",
        "aws-node-termination-handler/scheduled-maintenance",
        "aws-node-termination-handler/rebalance-recommendation",
    }
)
"""Taints of nodes that are about to go."""
COMING = frozenset(
    {
        "node.cloudprovider.kubernetes.io/uninitialized",
        "karpenter.sh/unregistered",
        "node.cilium.io/agent-not-ready",
        "ebs.csi.aws.com/agent-not-ready",
        "efs.csi.aws.com/agent-not-ready",
        "startup-taint.cluster-autoscaler.kubernetes.io",
        "ignore-taint.cluster-autoscaler.kubernetes.io",
    }
)
"""Taints of nodes that are still being set up; the last two are prefixes of the admin's own."""

_PRESSURES = ("DiskPressure", "MemoryPressure", "PIDPressure", "NetworkUnavailable")

_Expression = Mapping[str, Any]


def matches(pod: Any, node: Any) -> bool:
    """Return whether the node has the labels that the pod's selector and required affinity ask for."""
    return not missing(pod, node)


def missing(pod: Any, node: Any) -> list[str]:
    """Return what the node's labels lack, one requirement each; of alternatives, those of the nearest."""
    labels = reading.mapping(node, "metadata", "labels")
    selector = reading.mapping(pod, "spec", "nodeSelector")
    lacking = [f"{key}={value}" for key, value in sorted(selector.items()) if labels.get(key) != value]
    path = ("spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    terms = reading.entries(pod, *path, "nodeSelectorTerms")
    if not terms:
        return lacking
    return lacking + min((_lacks(term, node) for term in terms), key=lambda found: (len(found), found))


def _lacks(term: Any, node: Any) -> list[str]:
    labels = reading.mapping(node, "metadata", "labels")
    fields = {"metadata.name": reading.name(node)}
    expressions = [(entry, labels) for entry in reading.entries(term, "matchExpressions")]
    expressions += [(entry, fields) for entry in reading.entries(term, "matchFields")]
    if not expressions:
        return ["nothing: an empty term matches no node"]
    return [_sentence(entry) for entry, values in expressions if not _holds(entry, values)]


def _holds(expression: _Expression, labels: Mapping[str, Any]) -> bool:
    test = _OPERATORS.get(reading.text(expression, "operator"))
    value = labels.get(reading.text(expression, "key"))
    return test is not None and test(value if isinstance(value, str) else None, reading.texts(expression, "values"))


def _number(value: str | None) -> int | None:
    # The scheduler reads 64-bit integers.
    return int(value) if value is not None and value.lstrip("-").isdecimal() and len(value) < 20 else None


def _compares(test: Callable[[int, int], bool]) -> Callable[[str | None, list[str]], bool]:
    def compare(value: str | None, values: list[str]) -> bool:
        left, right = _number(value), _number(values[0] if len(values) == 1 else None)
        return left is not None and right is not None and test(left, right)

    return compare


_OPERATORS: dict[str, Callable[[str | None, list[str]], bool]] = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, _: value is not None,
    "DoesNotExist": lambda value, _: value is None,
    "Gt": _compares(lambda left, right: left > right),
    "Lt": _compares(lambda left, right: left < right),
}


def _sentence(expression: _Expression) -> str:
    values = ", ".join(sorted(reading.texts(expression, "values")))
    words = f"{reading.text(expression, 'key')} {reading.text(expression, 'operator')}"
    return f"{words} [{values}]" if values else words


def forbids(requirement: str) -> bool:
    """Return whether a requirement of `missing` is about what a node must not have or be."""
    return requirement.partition(" ")[2].startswith(("NotIn ", "DoesNotExist"))


def untolerated(pod: Any, node: Any) -> list[str]:
    """Return the taints that keep the pod from the node, as `key[=value]:effect`; a cordon is one of them."""
    taints = reading.entries(node, "spec", "taints")
    if reading.dig(node, "spec", "unschedulable") is True and not any(
        reading.text(taint, "key") == CORDON for taint in taints
    ):
        taints = [*taints, {"key": CORDON, "effect": "NoSchedule"}]
    tolerations = reading.entries(pod, "spec", "tolerations")
    found = []
    for taint in taints:
        effect = reading.text(taint, "effect")
        if effect in {"NoSchedule", "NoExecute"} and not any(_tolerates(entry, taint) for entry in tolerations):
            found.append(shown(taint))
    return sorted(found)


def shown(taint: Any) -> str:
    """Return the taint as kubectl writes it."""
    value = reading.text(taint, "value")
    key = reading.text(taint, "key")
    return f"{key}{f'={value}' if value else ''}:{reading.text(taint, 'effect')}"


def _tolerates(toleration: Any, taint: Any) -> bool:
    effect, key = reading.text(toleration, "effect"), reading.text(toleration, "key")
    if effect and effect != reading.text(taint, "effect"):
        return False
    exists = reading.text(toleration, "operator") == "Exists"
    if not key:
        return exists
    if key != reading.text(taint, "key"):
        return False
    return exists or reading.text(toleration, "value") == reading.text(taint, "value")


def key_of(taint: str) -> str:
    """Return the key of a taint that `shown` wrote."""
    return taint.rsplit(":", 1)[0].split("=", 1)[0]


def is_among(taint: str, keys: Iterable[str]) -> bool:
    """Return whether the taint's key is one of these or begins with one of them."""
    return any(key_of(taint).startswith(key) for key in keys)


def ready(node: Any) -> bool:
    """Return whether the node's kubelet says that it is ready. A node that says nothing has just been made."""
    return reading.text(reading.condition(node, "Ready"), "status") == "True"


def trouble(node: Any) -> str:
    """Return what the node says about itself where it is not well."""
    pressures = [reading.condition(node, kind) for kind in _PRESSURES]
    found = next((entry for entry in pressures if entry.get("status") == "True"), reading.condition(node, "Ready"))
    said = [reading.text(found, key) for key in ("reason", "message")]
    return ": ".join(entry for entry in said if entry) or "it has not said that it is ready"


def created(node: Any) -> datetime:
    """Return when the node came; the beginning of time where it does not say."""
    return reading.moment(node, "metadata", "creationTimestamp") or datetime.min.replace(tzinfo=UTC)
