"""What the operator knows of the cluster: objects by uid, never older than what was known before.

Fed by watches, by complete lists, and by the answers to the operator's own writes, so that it reads its own writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusion_operator.node_state import NodeStates
from diffusion_operator.state import Object, SeenPod


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A complete list of the objects of one kind, as of one version."""

    items: tuple[Object, ...]
    resource_version: int


def version_of(item: Object) -> int:
    """Return the object's version; comparable between objects of one API server since Kubernetes 1.35 by contract."""
    text = str(item["metadata"].get("resourceVersion", "0"))
    return int(text) if text.isdigit() else 0


class Cache:
    """Objects of one kind."""

    def __init__(self) -> None:
        self._items: dict[str, Object] = {}

    def __iter__(self) -> Iterator[Object]:
        return iter(tuple(self._items.values()))

    def __len__(self) -> int:
        return len(self._items)

    def get(self, uid: str) -> Object | None:
        """Return the object, None where it is not known."""
        return self._items.get(uid)

    def named(self, name: str) -> Object | None:
        """Return the object of that name; for kinds without namespaces."""
        return next((item for item in self._items.values() if item["metadata"]["name"] == name), None)

    def put(self, item: Object) -> bool:
        """Take the object in unless a newer one is known; return whether it was news."""
        uid = item["metadata"]["uid"]
        known = self._items.get(uid)
        if known is not None and version_of(known) >= version_of(item):
            return False
        self._items[uid] = _without_managers(item)
        return True

    def remove(self, item: Object) -> bool:
        """Forget the object; return whether it was known."""
        return self._items.pop(item["metadata"]["uid"], None) is not None

    def replace(self, listing: Listing) -> list[Object]:
        """Take in a complete list; return what changed, vanished objects as they were last known."""
        changed = [item for item in listing.items if self.put(item)]
        present = {item["metadata"]["uid"] for item in listing.items}
        for uid, item in list(self._items.items()):
            # What is newer than the list was created after it was made.
            if uid not in present and version_of(item) <= listing.resource_version:
                self.remove(item)
                changed.append(item)
        return changed


class PodCache(Cache):
    """Pods, found by the job that owns them. A deleted pod stays as it was last seen until `bury`."""

    def __init__(self) -> None:
        super().__init__()
        self._gone: dict[str, Object] = {}
        self._by_owner: dict[str, set[str]] = {}
        self.nodes = NodeStates()

    def of_job(self, uid: str) -> tuple[SeenPod, ...]:
        """Return the job's pods by attempt and name, gone ones among them."""
        found: list[SeenPod] = []
        for pod_uid in self._by_owner.get(uid, ()):
            present = self._items.get(pod_uid)
            raw = self._gone[pod_uid] if present is None else present
            node = str(raw["spec"].get("nodeName") or "")
            found.append(SeenPod(raw, gone=present is None, node_state=self.nodes.of(node)))
        return tuple(sorted(found, key=lambda pod: (pod.attempt, pod.name)))

    def owners_on(self, node: str) -> set[str]:
        """Return the uids of the jobs with a pod on the node, gone ones among them."""
        placed = [*self._items.values(), *self._gone.values()]
        return {owner_uid(pod) for pod in placed if pod["spec"].get("nodeName") == node}

    def put(self, item: Object) -> bool:
        """Take the pod in; one that is known to be gone does not come back."""
        uid = item["metadata"]["uid"]
        if uid in self._gone or not super().put(_as_first_asked(self._items.get(uid), item)):
            return False
        self._by_owner.setdefault(owner_uid(item), set()).add(uid)
        return True

    def remove(self, item: Object) -> bool:
        """Remember the pod as gone. What the deletion itself shows is the last that will be seen of it."""
        uid = item["metadata"]["uid"]
        known = self._items.get(uid)
        if known is None:
            return False
        self._gone[uid] = _as_first_asked(known, item) if version_of(item) >= version_of(known) else known
        return super().remove(item)

    def bury(self, owner: str, *, before_attempt: int | None = None) -> None:
        """Forget a job's gone pods: those of attempts before that one, or all."""
        for pod in self.of_job(owner):
            if pod.gone and (before_attempt is None or pod.attempt < before_attempt):
                uid = pod.raw["metadata"]["uid"]
                del self._gone[uid]
                self._by_owner[owner].discard(uid)
        if not self._by_owner.get(owner, True):
            del self._by_owner[owner]


def _as_first_asked(known: Object | None, item: Object) -> Object:
    """Return the pod with the deletion that was asked for first.

    A kubelet that is done removes the pod by a deletion without grace, and so the time of its removal, after the
    container's end, stands where the request stood before: the pod would look as if it had ended by itself.
    """
    old, new = (known or {}).get("metadata", {}), item["metadata"]
    if not old.get("deletionGracePeriodSeconds") or new.get("deletionGracePeriodSeconds") != 0:
        return item
    kept = {key: old[key] for key in ("deletionTimestamp", "deletionGracePeriodSeconds")}
    return {**item, "metadata": {**new, **kept}}


def _without_managers(item: Object) -> Object:
    """Return the object without `managedFields`: nobody here reads them, and they take as much memory as the rest.

    A write without them changes nothing about them.
    """
    if "managedFields" not in item["metadata"]:
        return item
    return {**item, "metadata": {key: value for key, value in item["metadata"].items() if key != "managedFields"}}


def owner_uid(item: Object) -> str:
    """Return the uid of the object's controller; empty where it has none."""
    for reference in item["metadata"].get("ownerReferences") or ():
        if reference.get("controller"):
            return str(reference["uid"])
    return ""
