"""The real reconciler on a cluster in memory with a clock of the test's own: lives of jobs in no time."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

from diffusion_operator.errors import ClusterError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.metrics import Metrics
from diffusion_operator.reconcile import Reconciler
from diffusion_operator.settings import Settings
from diffusion_operator.state import Heard
from testkit.builders import NOW, Object, at, container, make_profile, merge
from testkit.fakes import MemoryCluster, SilentProgress


class Simulation:
    """One job, its operator, and what the test makes happen."""

    def __init__(self, job: Object, *, profile: Object | None = None, others: tuple[Object, ...] = ()) -> None:
        self.seconds = 0.0
        self.cluster = MemoryCluster()
        for offered in (profile or make_profile(), *others):
            self.cluster.add_profile(offered)
        self.cluster.add_job(job)
        self.uid: str = job["metadata"]["uid"]
        self.progress = SilentProgress()
        self.restart()

    def restart(self) -> None:
        """Start an operator that knows nothing but what it reads."""
        self.knowledge = Knowledge()
        self.progress.said.clear()
        knowledge = self.knowledge
        self.reconciler = Reconciler(
            settings=Settings(trainer_image="t", preflight=False),
            cluster=self.cluster,
            knowledge=knowledge,
            progress=self.progress,
            metrics=Metrics(version="0", jobs=lambda: knowledge.jobs, depth=lambda: 0),
            clock=lambda: self.now,
        )
        self.read()

    @property
    def now(self) -> datetime:
        """The time."""
        return NOW + timedelta(seconds=self.seconds)

    def read(self) -> None:
        """Let the operator hear of everything."""
        asyncio.run(self.knowledge.refresh(self.cluster, (), lambda _uid: None))

    def look(self) -> float | None:
        """Let the operator hear of everything and look at the job, once; return when it wants to look again."""
        self.read()
        try:
            return asyncio.run(self.reconciler.reconcile(self.uid))
        except ClusterError:
            return 0

    def settle(self) -> float | None:
        """Let the operator look until it has nothing more to do now; return when it wants to look again."""
        for _ in range(20):
            again = self.look()
            if again != 0:
                return again
        raise AssertionError("the operator never comes to rest")

    @property
    def exists(self) -> bool:
        """Whether the job is still there."""
        return bool(self.cluster.jobs)

    @property
    def status(self) -> Object:
        """The job's status."""
        (job,) = self.cluster.jobs.values()
        found: Object = job["status"]
        return found

    def run_pod(self, name: str, *, node: str = "n1") -> None:
        """Let the pod run on the node from now on."""
        spec = {**self.cluster.pods["team-a", name]["spec"], "nodeName": node}
        status = {"phase": "Running", "podIP": "10.0.0.7", "startTime": at(self.seconds), **container(running={})}
        self.cluster.set_pod(name, spec=spec, status=status)

    def find_no_node(self, name: str, why: str) -> None:
        """Let the scheduler say of the pod why it has no node: `1 Insufficient nvidia.com/gpu`."""
        said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        message = f"0/1 nodes are available: {why}."
        self.cluster.set_pod(name, status={"phase": "Pending", "conditions": [said | {"message": message}]})

    def end_pod(self, name: str, code: int, *, message: str = "", **status: Any) -> None:
        """Let the pod's container end now."""
        state = {"exitCode": code, "message": message, "reason": "Error", "finishedAt": at(self.seconds)}
        old = self.cluster.pods["team-a", name]["status"]
        phase = {"phase": "Failed" if code else "Succeeded"}
        self.cluster.set_pod(name, status=merge(old, phase | container(terminated=state) | status))

    def hears(self, heard: Heard) -> None:
        """Let the trainer's answer be this one."""
        self.progress.said[self.uid] = heard
