"""A cluster in memory with Kueue, as docs/reference/kueue.md describes it: gates, groups, finalizers, replacements."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from diffusion_api import names
from testkit.builders import Object, at
from testkit.fakes import MemoryCluster

GATE = {"name": f"{names.KUEUE_PREFIX}admission"}
EVICTED = {
    "type": "TerminationTarget",
    "status": "True",
    "reason": "WorkloadEvictedDueToPreempted",
    "message": "made room",
}


@dataclass
class QueuedCluster(MemoryCluster):
    """Kueue reacts to each write at once, but for admission and eviction, which the test decides."""

    admitted: dict[str, bool] = field(default_factory=dict)
    """Whether each Workload, by name, has its quota."""
    finished: set[str] = field(default_factory=set)
    """Groups whose names are used up: their pods are looked after no more."""

    def admit(self) -> None:
        """Give every group of pods its quota that is there as a whole."""
        for name in self.admitted:
            self.admitted[name] = True
        self.settle()

    def evict(self, at_seconds: float) -> list[str]:
        """Take the quota of every group back; return the names of the pods that are told to stop."""
        told: list[str] = []
        for name, members in self._groups().items():
            if not self.admitted.get(name):
                continue
            self.admitted[name] = False
            for pod in members:
                if pod["status"]["phase"] in {"Pending", "Running"} and not _gated(pod):
                    pod["status"] = {**pod["status"], "conditions": [EVICTED]}
                    self._delete(pod, at_seconds)
                    told.append(pod["metadata"]["name"])
        self.settle()
        return told

    def settle(self) -> None:
        """Do what Kueue does when something has changed about pods."""
        for name, members in self._groups().items():
            total = int(members[0]["metadata"]["annotations"][names.ANNOTATION_POD_GROUP_COUNT])
            counted = [pod for pod in members if _counts(pod)]
            inactive = [pod for pod in members if not _counts(pod)]
            if name in self.finished:
                continue
            if name not in self.admitted:
                if len(counted) < total:
                    continue
                self.admitted[name] = False
            for pod in counted[total:]:
                self._release(pod)
                self._remove(pod)
            spare = len(inactive) + len(counted) - total
            for pod in inactive[: max(0, spare)]:
                self._release(pod)
            if self.admitted[name]:
                for pod in counted:
                    pod["spec"] = {key: value for key, value in pod["spec"].items() if key != "schedulingGates"}
                    self._store(self.pods, pod)
            self._finish(name, members, total)

    def _finish(self, name: str, members: list[Object], total: int) -> None:
        marks = [pod["metadata"]["annotations"].get(names.ANNOTATION_RETRIABLE) for pod in members]
        ended = all(pod["status"]["phase"] in {"Succeeded", "Failed"} for pod in members)
        succeeded = sum(pod["status"]["phase"] == "Succeeded" for pod in members)
        if succeeded == total or (ended and "false" in marks):
            self.finished.add(name)
            for pod in members:
                self._release(pod)

    async def create_pod(self, pod: Object) -> Object:
        if names.LABEL_POD_GROUP in pod["metadata"]["labels"]:
            metadata = {**pod["metadata"], "finalizers": [names.FINALIZER_KUEUE]}
            pod = {**pod, "metadata": metadata, "spec": {**pod["spec"], "schedulingGates": [GATE]}}
        return await super().create_pod(pod)

    async def delete_pod(self, pod: Object) -> None:
        key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
        current = self.pods.get(key)
        if current is None or not _held(current):
            return await super().delete_pod(pod)
        self._write(f"delete {key[1]}", lambda: self._delete(current, 0))
        return None

    async def delete_workload(self, namespace: str, name: str) -> None:
        def write() -> None:
            for pod in self._groups().get(name, []):
                self._delete(pod, 0)
                self._release(self.pods.get((namespace, pod["metadata"]["name"]), pod))
            self.admitted.pop(name, None)

        self._write(f"delete workload {name}", write)

    def end_deletion(self, name: str, at_seconds: float) -> None:
        """End a pod that was deleted, as its kubelet does: Kueue keeps its object."""
        pod = self.pods["team-a", name]
        self._delete(pod, at_seconds)
        pod = self.pods["team-a", name]
        pod["status"] = {**pod["status"], "phase": "Failed"}
        self._store(self.pods, pod)
        self.settle()

    def _write(self, what: str, write: Any) -> Any:
        answer = super()._write(what, write)
        self.settle()
        return answer

    def _groups(self) -> dict[str, list[Object]]:
        groups: dict[str, list[Object]] = defaultdict(list)
        for pod in sorted(self.pods.values(), key=lambda pod: self.created.index(pod["metadata"]["name"])):
            name = pod["metadata"]["labels"].get(names.LABEL_POD_GROUP)
            if name and _held(pod):
                groups[name].append(pod)
        return groups

    def _delete(self, pod: Object, at_seconds: float) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30) if pod["spec"].get("nodeName") else 0
            pod["metadata"] |= {"deletionTimestamp": at(at_seconds + grace), "deletionGracePeriodSeconds": grace}
        self._store(self.pods, pod)

    def _release(self, pod: Object) -> None:
        pod["metadata"] = {key: value for key, value in pod["metadata"].items() if key != "finalizers"}
        self._store(self.pods, pod)
        over = pod["status"]["phase"] in {"Succeeded", "Failed"} or not pod["spec"].get("nodeName")
        if "deletionTimestamp" in pod["metadata"] and over:
            self._remove(pod)

    def _remove(self, pod: Object) -> None:
        self.pods.pop(("team-a", pod["metadata"]["name"]), None)
        self.version += 1


def _held(pod: Object) -> bool:
    return names.FINALIZER_KUEUE in pod["metadata"].get("finalizers", ())


def _gated(pod: Object) -> bool:
    return bool(pod["spec"].get("schedulingGates"))


def _counts(pod: Object) -> bool:
    unplaced = "deletionTimestamp" in pod["metadata"] and not pod["spec"].get("nodeName")
    return pod["status"]["phase"] != "Failed" and not unplaced
