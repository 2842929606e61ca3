"""Everything that the operator keeps in memory. All of it can be rebuilt from the cluster by reading it once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from diffusion_api.waiting import WaitingCause
from diffusion_operator.cache import Cache, PodCache, owner_uid
from diffusion_operator.cluster import Cluster
from diffusion_operator.state import Job, Object, Refusal, Surroundings

AROUND_SECONDS = 30
"""Least seconds between two looks at the rest of the cluster, however many jobs wait."""
QUEUE_SECONDS = 2
"""Least seconds between two looks at the queues of one namespace."""


@dataclass
class Knowledge:
    """The caches, and what the operator remembers to spare the API server repetitions."""

    jobs: Cache = field(default_factory=Cache)
    pods: PodCache = field(default_factory=PodCache)
    profiles: Cache = field(default_factory=Cache)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    """By job uid: why the API server did not create a pod, at the last attempt to."""
    told: dict[str, set[str]] = field(default_factory=dict)
    """By job uid: names of events that exist already."""
    _around: tuple[datetime, Surroundings] | None = None
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _workloads: dict[str, tuple[datetime, tuple[Object, ...] | None]] = field(default_factory=dict)
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def waiting_for_a_name(self) -> list[str]:
        """Return the uids of the jobs whose pod's name is taken by another pod."""
        return [uid for uid, refusal in self.refusals.items() if refusal.cause == WaitingCause.POD_NAME_TAKEN]

    def forget(self, uid: str) -> None:
        """Forget everything about a job that is gone."""
        self.refusals.pop(uid, None)
        self.told.pop(uid, None)
        self.pods.bury(uid)

    async def refresh(self, cluster: Cluster, namespaces: tuple[str, ...], changed: Callable[[str], None]) -> None:
        """Read the whole cluster, and call `changed` with the uid of every job that something changed about.

        Jobs first: pods that are newer than their job's status are understood, a status that is newer than the pods
        would speak of pods that seem to be missing.
        """
        for job in self.jobs.replace(await cluster.list_jobs(namespaces)):
            changed(job["metadata"]["uid"])
        for pod in self.pods.replace(await cluster.list_pods(namespaces)):
            changed(owner_uid(pod))
        for profile in self.profiles.replace(await cluster.list_profiles()):
            for uid in self.jobs_with(profile):
                changed(uid)

    async def around(self, cluster: Cluster, *, now: datetime) -> Surroundings:
        """Return the rest of the cluster as it was at most `AROUND_SECONDS` ago."""
        async with self._looking:
            if self._around is None or now - self._around[0] >= timedelta(seconds=AROUND_SECONDS):
                found = await cluster.look_around()
                self._around = (now, replace(found, job_ends=self._job_ends()))
            return self._around[1]

    async def workloads(self, cluster: Cluster, namespace: str, *, now: datetime) -> tuple[Object, ...] | None:
        """Return Kueue's Workloads of the namespace as they were at most `QUEUE_SECONDS` ago."""
        async with self._asking:
            known = self._workloads.get(namespace)
            if known is None or not timedelta(0) <= now - known[0] < timedelta(seconds=QUEUE_SECONDS):
                known = (now, await cluster.list_workloads(namespace))
                self._workloads[namespace] = known
            return known[1]

    def _job_ends(self) -> dict[str, datetime]:
        # Thousands of finished jobs have progress too; reading each of them would hold everything up.
        jobs = (Job.read(raw) for raw in self.jobs if _runs(raw))
        return {f"{job.namespace}/{job.name}": end for job in jobs if (end := job.expected_end) is not None}

    def jobs_with(self, profile: Object) -> list[str]:
        """Return the uids of the jobs that ask for the profile."""
        name = profile["metadata"]["name"]
        wanted = [(job, (job.get("spec") or {}).get("resources") or {}) for job in self.jobs]
        asked = (
            (job, {resources.get("profile"), *(entry.get("profile") for entry in resources.get("alternatives") or ())})
            for job, resources in wanted
        )
        return [job["metadata"]["uid"] for job, profiles in asked if name in profiles]


def _runs(job: Object) -> bool:
    """Return whether all pods of the job run; from the raw object, which costs a hundredth of reading it."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(one.get("type") == "PodsReady" and one.get("status") == "True" for one in conditions)
