"""The only writer: the status first, then pods, then what Kueue has to be told, then events.

The status comes first because it is what survives: an attempt's number stands there before its pods exist, an ending
before anything is tidied up. Whatever a crash leaves undone, the next look at the job finds to be done.
"""

from __future__ import annotations

import logging
from datetime import datetime

from diffusion_api import names
from diffusion_api.waiting import WaitingCause
from diffusion_api.waiting_table import hint
from diffusion_operator.cluster import Cluster
from diffusion_operator.desired import event
from diffusion_operator.errors import ConflictError, ExistsError, NotFoundError, RefusedError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.policies.waiting.refused import why_refused
from diffusion_operator.state import Decision, Job, Mark, Object, Refusal, SeenPod
from diffusion_operator.status import to_object

logger = logging.getLogger(__name__)


async def apply(decision: Decision, job: Job, *, knowledge: Knowledge, cluster: Cluster) -> bool:
    """Bring it about; return whether the status was written.

    Raises:
        ConflictError: the job is not as it was read; look again.
        RefusedError: the API server will not have a pod; `knowledge.refusals` says why.
        UnavailableError: look again later.
    """
    written = False
    if decision.status is not None:
        status = to_object(decision.status)
        if status != job.raw.get("status"):
            knowledge.jobs.put(await cluster.write_status(job.raw, status))
            written = True
    for pod in decision.delete:
        await _delete(pod, knowledge=knowledge, cluster=cluster)
    if decision.delete_job:
        await cluster.delete_job(job.raw)
    for manifest in decision.create:
        await _create(manifest, job, knowledge=knowledge, cluster=cluster)
    await tell_kueue(decision.mark, decision.leave, namespace=job.namespace, knowledge=knowledge, cluster=cluster)
    return written


async def tell_kueue(
    mark: tuple[Mark, ...], leave: tuple[str, ...], *, namespace: str, knowledge: Knowledge, cluster: Cluster
) -> None:
    """Change pods' marks and delete Workloads; what is gone already needs neither.

    Raises:
        RefusedError: the rights for it were not given; examples/install/operator.yaml has them.
        UnavailableError: look again later.
    """
    for one in mark:
        try:
            knowledge.pods.put(await cluster.patch_pod(one.pod.raw, one.metadata))
        except (ConflictError, NotFoundError) as error:
            logger.debug("pod %s is gone: %s", one.pod.name, error)
    for name in leave:
        try:
            await cluster.delete_workload(namespace, name)
        except NotFoundError as error:
            logger.debug("left already: %s", error)


async def tell(job: Job, *, now: datetime, knowledge: Knowledge, cluster: Cluster) -> None:
    """Create the events that the job's status speaks of and that do not exist yet."""
    told = knowledge.told.setdefault(job.uid, set())
    for notice in event.notices(job.status, now=now):
        manifest = event.build(job, notice)
        name = manifest["metadata"]["name"]
        if name in told:
            continue
        try:
            await cluster.create_event(manifest)
        except (ExistsError, NotFoundError):
            pass  # told before a restart; or the namespace is gone, and the job with it
        except RefusedError as error:
            # News is worth a line in the log, but not that the job waits for it.
            logger.warning("job %s/%s: event %s: %s", job.namespace, job.name, notice.reason, error)
        told.add(name)


async def _delete(pod: SeenPod, *, knowledge: Knowledge, cluster: Cluster) -> None:
    """Ask for the pod's deletion. One that is gone, or whose name another has by now, is forgotten before the watch."""
    metadata = pod.raw["metadata"]
    try:
        await cluster.delete_pod(pod.raw)
    except NotFoundError:
        knowledge.pods.remove(pod.raw)
    except ConflictError:
        try:
            present = (await cluster.get_pod(metadata["namespace"], metadata["name"]))["metadata"]["uid"]
        except NotFoundError:
            present = ""
        if present == metadata["uid"]:
            raise  # it may well run: nothing must be started beside it
        knowledge.pods.remove(pod.raw)


async def _create(manifest: Object, job: Job, *, knowledge: Knowledge, cluster: Cluster) -> None:
    metadata = manifest["metadata"]
    is_service = manifest["kind"] == "Service"
    get = cluster.get_service if is_service else cluster.get_pod
    try:
        created = await (cluster.create_service(manifest) if is_service else cluster.create_pod(manifest))
    except ExistsError:
        created = await get(metadata["namespace"], metadata["name"])
        if not _is_ours(created, manifest):
            knowledge.refusals[job.uid] = _taken(manifest)
            kind, name = manifest["kind"].lower(), metadata["name"]
            raise RefusedError(f"{kind} {name}: the name is taken by a {kind} that is not of this job") from None
    except RefusedError as error:
        found = why_refused(str(error), namespace=job.namespace)
        knowledge.refusals[job.uid] = Refusal(cause=found.cause, detail=found.detail, hint=found.hint)
        raise
    knowledge.refusals.pop(job.uid, None)
    if manifest["kind"] == "Pod":
        knowledge.pods.put(created)


def _taken(manifest: Object) -> Refusal:
    """Return what to say of a name that somebody else's object has."""
    name, namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    if manifest["kind"] == "Service":
        cause, words = WaitingCause.SERVICE_NAME_TAKEN, {"service": name}
    else:
        cause, words = WaitingCause.POD_NAME_TAKEN, {"pod": name}
    return Refusal(
        cause=cause,
        detail=f"a {manifest['kind'].lower()} {name} exists and is not of this job",
        hint=hint(cause, namespace=namespace, **words),
    )


def _is_ours(existing: Object, manifest: Object) -> bool:
    """Return whether an existing object is the one that was to be created: of the same job, attempt and rank."""
    found, wanted = existing["metadata"].get("labels") or {}, manifest["metadata"]["labels"]
    keys = (names.LABEL_JOB_UID, names.LABEL_ATTEMPT, names.LABEL_RANK)
    return all(found.get(key) == wanted.get(key) for key in keys)
