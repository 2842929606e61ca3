"""One look at one job: observe, decide, apply, tell. The only place below `handlers` that knows the time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from diffusion_api import names
from diffusion_api.status import JobStatus
from diffusion_operator.apply import apply, tell, tell_kueue
from diffusion_operator.cluster import Cluster
from diffusion_operator.decide import decide
from diffusion_operator.errors import ConflictError, NotFoundError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.metrics import Metrics
from diffusion_operator.observe import observe
from diffusion_operator.policies.queueing import leaving
from diffusion_operator.progress import ProgressSource
from diffusion_operator.settings import Settings
from diffusion_operator.state import Decision, Job

logger = logging.getLogger(__name__)

PROGRESS_WRITES_PER_SECOND = 20
"""Bound on status writes that only report progress, over all jobs."""


@dataclass(frozen=True, kw_only=True)
class Reconciler:
    """Brings jobs to where they should be, one look at a time."""

    settings: Settings
    cluster: Cluster
    knowledge: Knowledge
    progress: ProgressSource
    metrics: Metrics
    clock: Callable[[], datetime]

    async def reconcile(self, uid: str) -> float | None:
        """Look at the job once; return after how many seconds to look again, None to wait for news.

        Raises:
            ClusterError: something could not be read or written; look again later.
        """
        raw = self.knowledge.jobs.get(uid)
        now = self.clock()
        if raw is None:
            await self._leave_queue(uid, now)
            self.forget(uid)
            return None
        job = Job.read(raw)
        self._bury(job)
        seen = await observe(
            job,
            knowledge=self.knowledge,
            cluster=self.cluster,
            progress=self.progress,
            settings=self.settings,
            now=now,
        )
        decision = decide(job, seen, now=now, status_seconds=self._status_seconds())
        logger.debug("job %s/%s: %s", job.namespace, job.name, decision.rule)
        try:
            written = await apply(decision, job, knowledge=self.knowledge, cluster=self.cluster)
        except (ConflictError, NotFoundError):
            await self._read_again(job)
            if self.knowledge.jobs.get(uid) is not None:
                raise
            self.forget(uid)
            return None
        if written and decision.status is not None:
            self._note(job, decision.status)
        self._follow(job, decision)
        await self._tell(uid, now)
        return 0 if decision.create else decision.again_seconds

    def _status_seconds(self) -> float:
        """Return the least seconds between two writes that only report a job's progress: more where many jobs run."""
        return max(self.settings.status_seconds, len(self.progress) / PROGRESS_WRITES_PER_SECOND)

    async def _leave_queue(self, uid: str, now: datetime) -> None:
        """Give back the place of a job that is gone: garbage collection waits for Kueue, which waits for new pods."""
        pods = self.knowledge.pods.of_job(uid)
        found = leaving(pods, kept=None, now=now)
        if not found.mark and not found.leave:
            return
        metadata = pods[0].raw["metadata"]
        namespace = metadata["namespace"]
        try:
            job = await self.cluster.get_job(namespace, metadata["labels"][names.LABEL_JOB_NAME])
            if job["metadata"]["uid"] == uid:
                self.knowledge.jobs.put(job)  # not gone: only unheard of
                return
        except NotFoundError:
            logger.debug("job %s in %s is gone, its pods are not", uid, namespace)
        await tell_kueue(found.mark, found.leave, namespace=namespace, knowledge=self.knowledge, cluster=self.cluster)

    def forget(self, uid: str) -> None:
        """Forget a job that is gone."""
        self.knowledge.forget(uid)
        self.progress.forget(uid)

    async def _read_again(self, job: Job) -> None:
        """Replace what is known of a job that turned out to be out of date."""
        try:
            self.knowledge.jobs.put(await self.cluster.get_job(job.namespace, job.name))
        except NotFoundError:
            self.knowledge.jobs.remove(job.raw)

    async def _tell(self, uid: str, now: datetime) -> None:
        raw = self.knowledge.jobs.get(uid)
        if raw is not None:
            await tell(Job.read(raw), now=now, knowledge=self.knowledge, cluster=self.cluster)

    def _follow(self, job: Job, decision: Decision) -> None:
        pod = decision.poll
        if pod is None or not pod.address:
            self.progress.forget(job.uid)
        else:
            self.progress.follow(job.uid, address=pod.address, attempt=pod.attempt)

    def _note(self, job: Job, status: JobStatus) -> None:
        """Log and count what the written status says that the one before did not."""
        if status.phase != job.status.phase:
            logger.info("job %s/%s: %s: %s", job.namespace, job.name, status.phase, status.message)
        self.metrics.note(job, status)

    def _bury(self, job: Job) -> None:
        """Forget gone pods of attempts whose end has been judged and written down."""
        newest = job.status.attempts[0] if job.status.attempts else None
        if newest is not None:
            judged = newest.number + 1 if newest.ended_at else newest.number
            self.knowledge.pods.bury(job.uid, before_attempt=judged)
