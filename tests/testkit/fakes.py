"""A cluster in memory, with the rules of an API server that the operator relies on.

Versions grow with each write, a status is only taken with the version that was read, names are taken once, deletion of
a pod is graceful. `fail_at` makes the n-th write crash the caller, before or after it takes effect.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from diffusion_operator.cache import Listing
from diffusion_operator.errors import ConflictError, ExistsError, NotFoundError, UnavailableError
from diffusion_operator.state import Heard, Surroundings
from testkit.builders import at, merge

Object = dict[str, Any]
Key = tuple[str, str]


class Crash(BaseException):
    """The operator dies here. No Exception, so that no handler of errors mistakes it for one."""


@dataclass
class MemoryCluster:
    """Implements `diffusion_operator.cluster.Cluster`."""

    jobs: dict[Key, Object] = field(default_factory=dict)
    pods: dict[Key, Object] = field(default_factory=dict)
    services: dict[Key, Object] = field(default_factory=dict)
    profiles: dict[str, Object] = field(default_factory=dict)
    events: dict[Key, Object] = field(default_factory=dict)
    pod_events: list[Object] = field(default_factory=list)
    around: Surroundings = field(default_factory=Surroundings)
    looks: int = 0
    """How often somebody looked around."""
    created: list[str] = field(default_factory=list)
    """Names of all pods that were ever created, in order."""
    writes: list[str] = field(default_factory=list)
    """Every write that was asked for."""
    fail_at: tuple[int, str] | None = None
    """(n, `before` or `after`): crash at the n-th write from now; `unanswered`: do it and lose the answer."""
    errors: list[Exception] = field(default_factory=list)
    """Answers to the next writes instead of doing them."""
    version: int = 100
    workloads: list[Object] | None = None
    """Kueue's; None without Kueue."""

    def add_job(self, job: Object) -> Object:
        """Put a job in, as a user does."""
        return self._store(self.jobs, job)

    def add_profile(self, profile: Object) -> None:
        """Put a profile in."""
        self.profiles[profile["metadata"]["name"]] = self._versioned(profile)

    def change_spec(self, namespace: str, name: str, **spec: Any) -> Object:
        """Change a job's spec, as a user does."""
        job = self.jobs[namespace, name]
        changed = copy.deepcopy(job)
        changed["spec"].update(spec)
        changed["metadata"]["generation"] += changed["spec"] != job["spec"]
        return self._store(self.jobs, changed)

    def set_pod(self, name: str, *, namespace: str = "team-a", **changes: Any) -> Object:
        """Change a pod, as its kubelet does; `status` and `spec` replace what stands there."""
        return self._store(self.pods, {**self.pods[namespace, name], **copy.deepcopy(changes)})

    def drop_pod(self, name: str, *, namespace: str = "team-a") -> Object:
        """Remove a pod, as its kubelet does at the end of its deletion."""
        return self._versioned(self.pods.pop((namespace, name)))

    async def list_jobs(self, namespaces: tuple[str, ...]) -> Listing:
        return self._listing(self.jobs, namespaces)

    async def list_pods(self, namespaces: tuple[str, ...]) -> Listing:
        return self._listing(self.pods, namespaces)

    async def list_profiles(self) -> Listing:
        return Listing(items=tuple(copy.deepcopy(list(self.profiles.values()))), resource_version=self.version)

    async def get_job(self, namespace: str, name: str) -> Object:
        return self._get(self.jobs, (namespace, name))

    async def get_pod(self, namespace: str, name: str) -> Object:
        return self._get(self.pods, (namespace, name))

    async def write_status(self, job: Object, status: Object) -> Object:
        def write() -> Object:
            key = _key(job)
            current = self._get(self.jobs, key)
            if current["metadata"]["resourceVersion"] != job["metadata"]["resourceVersion"]:
                raise ConflictError(f"{key}: not as it was read")
            return self._store(self.jobs, {**current, "status": copy.deepcopy(status)})

        written: Object = self._write(f"status {job['metadata']['name']}", write)
        return written

    async def delete_job(self, job: Object) -> None:
        def write() -> None:
            current, read = self._get(self.jobs, _key(job))["metadata"], job["metadata"]
            if any(current[key] != read[key] for key in ("uid", "resourceVersion")):
                raise ConflictError(f"{_key(job)}: not as it was read")
            del self.jobs[_key(job)]
            self.version += 1

        self._write(f"delete job {job['metadata']['name']}", write)

    async def create_pod(self, pod: Object) -> Object:
        def write() -> Object:
            name = pod["metadata"]["name"]
            self._free(self.pods, _key(pod))
            self.created.append(name)
            stored = {**copy.deepcopy(pod), "status": {"phase": "Pending"}}
            stored["metadata"]["uid"] = f"{name}-{len(self.created)}"
            return self._store(self.pods, stored)

        created: Object = self._write(f"create {pod['metadata']['name']}", write)
        return created

    async def create_service(self, service: Object) -> Object:
        def write() -> Object:
            self._free(self.services, _key(service))
            return self._store(self.services, service)

        created: Object = self._write(f"create service {service['metadata']['name']}", write)
        return created

    async def get_service(self, namespace: str, name: str) -> Object:
        return self._get(self.services, (namespace, name))

    async def delete_pod(self, pod: Object) -> None:
        def write() -> None:
            current = self._get(self.pods, _key(pod))
            if current["metadata"]["uid"] != pod["metadata"]["uid"]:
                raise ConflictError("another pod has the name")
            if not current.get("spec", {}).get("nodeName") or current["status"]["phase"] in {"Succeeded", "Failed"}:
                # Nothing runs that could want grace.
                self.pods.pop(_key(pod))
                self.version += 1
                return
            grace = current["spec"].get("terminationGracePeriodSeconds", 30)
            current["metadata"] |= {"deletionTimestamp": at(grace), "deletionGracePeriodSeconds": grace}
            self._store(self.pods, current)

        self._write(f"delete {pod['metadata']['name']}", write)

    async def patch_pod(self, pod: Object, metadata: Object) -> Object:
        def write() -> Object:
            current = self._get(self.pods, _key(pod))
            if current["metadata"]["uid"] != pod["metadata"]["uid"]:
                raise ConflictError("another pod has the name")
            return self._store(self.pods, merge(current, {"metadata": metadata}))

        patched: Object = self._write(f"patch {pod['metadata']['name']}", write)
        return patched

    async def list_workloads(self, namespace: str) -> tuple[Object, ...] | None:
        if self.workloads is None:
            return None
        found = [one for one in self.workloads if one["metadata"]["namespace"] == namespace]
        return tuple(copy.deepcopy(found))

    async def delete_workload(self, namespace: str, name: str) -> None:
        def write() -> None:
            left = [one for one in self.workloads or () if _key(one) != (namespace, name)]
            if len(left) == len(self.workloads or ()):
                raise NotFoundError(f"{name}: not found")
            self.workloads = left

        self._write(f"delete workload {name}", write)

    async def list_pod_events(self, pod: Object) -> tuple[Object, ...]:
        uid = pod["metadata"]["uid"]
        return tuple(event for event in self.pod_events if event["involvedObject"]["uid"] == uid)

    async def look_around(self) -> Surroundings:
        self.looks += 1
        return self.around

    async def create_event(self, event: Object) -> None:
        def write() -> None:
            self._free(self.events, _key(event))
            self._store(self.events, event)

        self._write(f"event {event['reason']}", write)

    def _write(self, what: str, write: Any) -> Any:
        self.writes.append(what)
        if self.errors:
            raise self.errors.pop(0)
        left, action = self.fail_at or (0, "")
        if left:
            self.fail_at = (left - 1, action) if left > 1 else None
        if (left, action) == (1, "before"):
            raise Crash(what)
        answer = write()
        if (left, action) == (1, "after"):
            raise Crash(what)
        if (left, action) == (1, "unanswered"):
            raise UnavailableError(f"{what}: done, but the answer was lost")
        return answer

    def _store(self, kind: dict[Key, Object], item: Object) -> Object:
        stored = self._versioned(item)
        kind[_key(item)] = stored
        return copy.deepcopy(stored)

    def _versioned(self, item: Object) -> Object:
        self.version += 1
        stored = copy.deepcopy(item)
        stored["metadata"]["resourceVersion"] = str(self.version)
        return stored

    @staticmethod
    def _free(kind: dict[Key, Object], key: Key) -> None:
        if key in kind:
            raise ExistsError(f"{key}: exists")

    @staticmethod
    def _get(kind: dict[Key, Object], key: Key) -> Object:
        if key not in kind:
            raise NotFoundError(f"{key}: not found")
        return copy.deepcopy(kind[key])

    def _listing(self, kind: dict[Key, Object], namespaces: tuple[str, ...]) -> Listing:
        found = [item for key, item in kind.items() if not namespaces or key[0] in namespaces]
        return Listing(items=tuple(copy.deepcopy(found)), resource_version=self.version)


@dataclass
class SilentProgress:
    """Implements `diffusion_operator.progress.ProgressSource`: says what the test put in."""

    said: dict[str, Heard] = field(default_factory=dict)
    followed: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.followed)

    def follow(self, uid: str, *, address: str, attempt: int) -> None:
        self.followed[uid] = (address, attempt)

    def forget(self, uid: str) -> None:
        self.followed.pop(uid, None)

    def heard(self, uid: str, *, attempt: int) -> Heard:
        heard = self.said.get(uid, Heard())
        return heard if heard.report is None or heard.report.attempt == attempt else Heard()


def _key(item: Object) -> Key:
    return item["metadata"]["namespace"], item["metadata"]["name"]
