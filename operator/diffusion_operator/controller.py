"""Everything that runs: workers, the periodic complete reading, the questions to trainers, and the HTTP server."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from diffusion_operator.cache import Cache, owner_uid
from diffusion_operator.cluster import KubernetesCluster
from diffusion_operator.errors import ClusterError, ConflictError, NotFoundError, SettingsError, UnavailableError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.leadership import Claim, Leadership
from diffusion_operator.metrics import Metrics
from diffusion_operator.progress import ProgressPoller
from diffusion_operator.reconcile import Reconciler
from diffusion_operator.settings import PREFIX, Settings, own_version
from diffusion_operator.state import Object
from diffusion_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

MISSING_CRDS = "the API server does not know our kinds: install them first, kubectl apply --server-side -f crds/"
STALE_FACTOR = 3
"""Relists that may fail in a row before /healthz says so."""


class Controller:
    """The running operator, apart from the watches, which `handlers` brings."""

    def __init__(self, settings: Settings, *, clock: Callable[[], datetime] | None = None) -> None:
        self._settings = settings
        self._clock = clock or (lambda: datetime.now(UTC))
        self._knowledge = Knowledge()
        self._queue = WorkQueue()
        self._metrics = Metrics(
            version=own_version(), jobs=lambda: self._knowledge.jobs, depth=lambda: len(self._queue)
        )
        self._progress = ProgressPoller(seconds=settings.progress_seconds, clock=self._clock, news=self._queue.add)
        self._tasks: list[asyncio.Task[None]] = []
        self._cluster: KubernetesCluster | None = None
        self._runner: web.AppRunner | None = None
        self._read_at: datetime | None = None
        self.watches_nodes = False
        """Whether nodes may be watched; known when it has started."""
        self._leadership: Leadership | None = None
        self._standing_by = False

    async def start(self) -> None:
        """Become the active operator, read the cluster once, then start to work.

        Raises:
            SettingsError: it cannot work here at all.
        """
        self._cluster = cluster = await KubernetesCluster.connect(self._settings, counted=self._metrics.request)
        await self._serve()
        await self._lead(cluster)
        try:
            # Nobody may work before everything was read: a pod that is not known yet would look like one that is lost.
            await self._refresh_until_it_works(cluster)
        except NotFoundError as error:
            raise SettingsError(MISSING_CRDS) from error
        reconciler = Reconciler(
            settings=self._settings,
            cluster=cluster,
            knowledge=self._knowledge,
            progress=self._progress,
            metrics=self._metrics,
            clock=self._clock,
        )
        for number in range(self._settings.workers):
            self._spawn(self._work(reconciler), name=f"worker {number}")
        self._spawn(self._relist(cluster), name="relist")
        if not self.watches_nodes:
            logger.info("no right to list nodes: that one is lost is noticed when the cluster deletes its pods")
        logger.info("started: %d jobs, %d pods", len(self._knowledge.jobs), len(self._knowledge.pods))

    async def stop(self) -> None:
        """End everything; what was in the middle of being done is found undone by the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._progress.close()
        if self._leadership is not None:
            await self._leadership.release()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._cluster is not None:
            await self._cluster.close()

    def job_seen(self, job: Object, *, gone: bool) -> None:
        """Take in news of a job."""
        if self._take(self._knowledge.jobs, job, gone=gone):
            self._queue.add(job["metadata"]["uid"])

    def pod_seen(self, pod: Object, *, gone: bool) -> None:
        """Take in news of a pod."""
        if self._take(self._knowledge.pods, pod, gone=gone):
            self._queue.add(owner_uid(pod))
        if gone:
            for uid in self._knowledge.waiting_for_a_name():
                self._queue.add(uid)  # now, rather than after a backoff that has grown meanwhile

    def node_seen(self, node: Object, *, gone: bool) -> None:
        """Take in news of a node, which may be the end of the pods on it."""
        nodes = self._knowledge.pods.nodes
        if nodes.remove(node) if gone else nodes.put(node):
            for uid in self._knowledge.pods.owners_on(node["metadata"]["name"]):
                self._queue.add(uid)

    def profile_seen(self, profile: Object, *, gone: bool) -> None:
        """Take in news of a profile, which jobs may have waited for."""
        if self._take(self._knowledge.profiles, profile, gone=gone):
            for uid in self._knowledge.jobs_with(profile):
                self._queue.add(uid)

    @staticmethod
    def _take(cache: Cache, item: Object, *, gone: bool) -> bool:
        return cache.remove(item) if gone else cache.put(item)

    async def _lead(self, cluster: KubernetesCluster) -> None:
        """Wait until this is the active one of several operators, and see to it that it stays so."""
        namespace, _, name = self._settings.lease.partition("/")
        if not name:
            self._metrics.active.set(1)
            return
        claim = Claim(
            namespace=namespace, name=name, identity=self._settings.identity, seconds=self._settings.lease_seconds
        )
        self._leadership = leadership = Leadership(cluster, claim)
        cluster.guard(leadership.held)
        logger.info("standing by as %s", claim.identity)
        self._standing_by = True
        await leadership.acquire()
        self._standing_by = False
        self._metrics.active.set(1)
        self._spawn(self._stay(leadership), name="lease")

    async def _stay(self, leadership: Leadership) -> None:
        """Hold the Lease; without it do nothing more, and end the process: what it knows may be out of date."""
        await leadership.hold()
        self._metrics.active.set(0)
        logger.error("the lease is lost: another operator takes over, and this one ends")
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        os.kill(os.getpid(), signal.SIGTERM)

    async def _work(self, reconciler: Reconciler) -> None:
        while True:
            uid = await self._queue.get()
            try:
                with self._metrics.reconcile_seconds.time():
                    again = await reconciler.reconcile(uid)
                self._queue.forgive(uid)
                if again is not None:
                    self._queue.add_after(uid, again)
            except ConflictError as error:
                logger.debug("job %s: changed meanwhile: %s", uid, error)
                self._queue.add_failed(uid)
            except ClusterError as error:
                self._failed(uid, error)
            except Exception as error:
                logger.exception("job %s: this is a defect of the operator", uid)
                self._failed(uid, error)
            finally:
                self._queue.done(uid)

    def _failed(self, uid: str, error: Exception) -> None:
        self._metrics.reconcile_errors.labels(error=type(error).__name__).inc()
        at_least = error.retry_after_seconds if isinstance(error, UnavailableError) else 0
        seconds = self._queue.add_failed(uid, at_least_seconds=at_least)
        logger.warning("job %s: %s; again in %.1f s", uid, error, seconds)

    async def _relist(self, cluster: KubernetesCluster) -> None:
        while True:
            await asyncio.sleep(self._settings.relist_seconds)
            try:
                await self._refresh(cluster)
            except ClusterError as error:
                logger.warning("the cluster could not be read: %s", error)

    async def _refresh_until_it_works(self, cluster: KubernetesCluster) -> None:
        while True:
            try:
                await self._refresh(cluster)
                self.watches_nodes = await cluster.may_list_nodes()
            except UnavailableError as error:
                logger.warning("the cluster cannot be read yet: %s", error)
                await asyncio.sleep(max(1.0, error.retry_after_seconds))
            else:
                return

    async def _refresh(self, cluster: KubernetesCluster) -> None:
        await self._knowledge.refresh(cluster, self._settings.namespaces, self._queue.add)
        self._read_at = self._clock()

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work, name=name))

    async def _serve(self) -> None:
        """Serve /metrics, /healthz (works) and /readyz (has read the cluster)."""
        if not self._settings.http_port:
            return
        app = web.Application()
        app.router.add_get("/metrics", self._answer_metrics)
        app.router.add_get("/healthz", self._answer_health)
        app.router.add_get("/readyz", self._answer_ready)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        address, port = self._settings.http_address, self._settings.http_port
        try:
            await web.TCPSite(self._runner, address, port).start()
        except OSError as error:
            raise SettingsError(f"{PREFIX}HTTP_PORT: {port} cannot be used: set another one ({error})") from error

    async def _answer_metrics(self, _request: web.Request) -> web.Response:
        # Beside the work: thousands of jobs have tens of thousands of series.
        text = await asyncio.to_thread(self._metrics.text)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _answer_ready(self, _request: web.Request) -> web.Response:
        if self._standing_by:
            # Or a rollout that waits for the new pod would never stop the old one, which holds the Lease.
            return web.Response(text="standing by")
        return web.Response(text="ok") if self._read_at else web.Response(status=503, text="reading the cluster")

    async def _answer_health(self, _request: web.Request) -> web.Response:
        dead = [task.get_name() for task in self._tasks if task.done()]
        if dead:
            return web.Response(status=503, text=f"ended: {', '.join(dead)}")
        limit = self._settings.relist_seconds * STALE_FACTOR
        if self._read_at is not None and (self._clock() - self._read_at).total_seconds() > limit:
            return web.Response(status=503, text=f"the cluster was last read at {self._read_at}")
        return web.Response(text="ok")
