"""What is free on a node, and who holds the rest. Requests count, as they do for kube-scheduler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from diffusion_api import names
from diffusion_operator.policies.waiting import reading

Amounts = Mapping[str, Decimal]


def requested(pod: Any) -> dict[str, Decimal]:
    """Return what the pod asks for: its containers together, or the largest init container, plus overhead.

    Sidecars (init containers that go on running) count as containers.
    """
    total: dict[str, Decimal] = defaultdict(Decimal)
    inits = reading.entries(pod, "spec", "initContainers")
    sidecars = [entry for entry in inits if reading.text(entry, "restartPolicy") == "Always"]
    for container in [*reading.entries(pod, "spec", "containers"), *sidecars]:
        for resource, amount in _of_container(container).items():
            total[resource] += amount
    for container in inits:
        if container not in sidecars:
            for resource, amount in _of_container(container).items():
                total[resource] = max(total[resource], amount)
    for resource, value in reading.mapping(pod, "spec", "overhead").items():
        total[resource] += reading.quantity(value)
    total["pods"] = Decimal(1)
    return dict(total)


def _of_container(container: Any) -> dict[str, Decimal]:
    # A limit without a request is a request.
    given = {**reading.mapping(container, "resources", "limits"), **reading.mapping(container, "resources", "requests")}
    return {resource: reading.quantity(value) for resource, value in given.items()}


def allocatable(node: Any) -> dict[str, Decimal]:
    """Return what the node offers to pods; nothing is said about a resource that it does not name."""
    return {key: reading.quantity(value) for key, value in reading.mapping(node, "status", "allocatable").items()}


def offers(node: Any, resource: str | None) -> bool:
    """Return whether the node has any of the resource; without a resource every node will do."""
    return resource is None or allocatable(node).get(resource, Decimal(0)) > 0


@dataclass(frozen=True)
class Room:
    """A node with what is free on it."""

    node: str
    total: Amounts
    free: Amounts

    def lacking(self, wanted: Amounts) -> list[str]:
        """Return the resources of which too little is free."""
        return sorted(key for key, amount in wanted.items() if amount > 0 and self._less(self.free, key, amount))

    def too_small(self, wanted: Amounts) -> list[str]:
        """Return the resources of which there is too little even when the node is empty."""
        return sorted(key for key, amount in wanted.items() if amount > 0 and self._less(self.total, key, amount))

    def _less(self, amounts: Amounts, key: str, amount: Decimal) -> bool:
        # A node that does not name pods or ephemeral-storage does not limit them; an extended resource it has not.
        known = key in self.total or key not in {"cpu", "memory", "pods", "ephemeral-storage"}
        return known and amounts.get(key, Decimal(0)) < amount


def rooms(nodes: Iterable[Any], pods: Iterable[Any]) -> list[Room]:
    """Return the nodes with what these pods leave free, by name."""
    used: dict[str, dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    for pod in pods:
        if reading.text(pod, "status", "phase") in {"Succeeded", "Failed"}:
            continue
        on = used[reading.text(pod, "spec", "nodeName")]
        for resource, amount in requested(pod).items():
            on[resource] += amount
    found = []
    for node in nodes:
        total = allocatable(node)
        taken = used.get(reading.name(node), {})
        free = {key: amount - taken.get(key, Decimal(0)) for key, amount in total.items()}
        found.append(Room(reading.name(node), total, free))
    return sorted(found, key=lambda room: (room.node, sorted(room.free.items())))


def holders(pods: Iterable[Any], nodes: Iterable[str], resource: str) -> dict[str, Decimal]:
    """Return who holds the resource on these nodes, by `namespace/job` or `namespace/pod`, the largest first."""
    wanted = set(nodes)
    held: dict[str, Decimal] = defaultdict(Decimal)
    for pod in pods:
        if reading.text(pod, "spec", "nodeName") not in wanted:
            continue
        if reading.text(pod, "status", "phase") in {"Succeeded", "Failed"}:
            continue
        amount = requested(pod).get(resource, Decimal(0))
        if amount > 0:
            job = reading.text(pod, "metadata", "labels", names.LABEL_JOB_NAME)
            held[f"{reading.namespace(pod)}/{job or reading.name(pod)}"] += amount
    return dict(sorted(held.items(), key=lambda entry: (-entry[1], entry[0])))
