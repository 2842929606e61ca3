"""From what is known to one frozen `Observed`."""

from __future__ import annotations

from datetime import datetime

from diffusion_api.resources import Resources
from diffusion_operator.cluster import Cluster
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.progress import ProgressSource
from diffusion_operator.settings import Settings
from diffusion_operator.state import Job, Object, Observed


async def observe(
    job: Job, *, knowledge: Knowledge, cluster: Cluster, progress: ProgressSource, settings: Settings, now: datetime
) -> Observed:
    """Return everything about the job.

    Asked for are only events of pods that wait, what is around those that find no node, and Kueue's view of those that
    it holds back; the rest is known.
    """
    pods = knowledge.pods.of_job(job.uid)
    events: list[Object] = []
    for pod in pods:
        if pod.waits_on_its_node or pod.unschedulable:
            events += await cluster.list_pod_events(pod.raw)
    around = await knowledge.around(cluster, now=now) if any(pod.unschedulable for pod in pods) else None
    gated = any(pod.gated for pod in pods)
    workloads = await knowledge.workloads(cluster, job.namespace, now=now) if gated else None
    resources = job.spec.resources if job.spec is not None else None
    others = {found["metadata"]["name"]: found for found in _alternatives(resources, knowledge)}
    return Observed(
        trainer_image=settings.trainer_image,
        preflight=settings.preflight,
        pods=pods,
        profile=knowledge.profiles.named(resources.profile if resources else ""),
        alternatives=others,
        profile_names=tuple(profile["metadata"]["name"] for profile in knowledge.profiles),
        pod_events=tuple(events),
        around=around,
        workloads=workloads,
        heard=progress.heard(job.uid, attempt=job.status.attempt),
        refusal=knowledge.refusals.get(job.uid),
    )


def _alternatives(resources: Resources | None, knowledge: Knowledge) -> list[Object]:
    names = {alternative.profile for alternative in resources.alternatives} if resources else set()
    found = (knowledge.profiles.named(name) for name in sorted(names))
    return [profile for profile in found if profile is not None]
