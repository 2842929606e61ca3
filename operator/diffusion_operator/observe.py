"""From what is known to one frozen `Observed`."""

from __future__ import annotations

from diffusion_operator.cluster import Cluster
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.progress import ProgressSource
from diffusion_operator.state import Job, Object, Observed, SeenPod


async def observe(
    job: Job, *, knowledge: Knowledge, cluster: Cluster, progress: ProgressSource, trainer_image: str
) -> Observed:
    """Return everything about the job. Only events of pods that wait on their node are asked for; the rest is known."""
    pods = knowledge.pods.of_job(job.uid)
    events: list[Object] = []
    for pod in pods:
        if _waits_on_its_node(pod):
            events += await cluster.list_pod_events(pod.raw)
    wanted = job.spec.resources.profile if job.spec is not None else ""
    return Observed(
        trainer_image=trainer_image,
        pods=pods,
        profile=knowledge.profiles.named(wanted),
        profile_names=tuple(profile["metadata"]["name"] for profile in knowledge.profiles),
        pod_events=tuple(events),
        heard=progress.heard(job.uid, attempt=job.status.attempt),
        refusal=knowledge.refusals.get(job.uid),
    )


def _waits_on_its_node(pod: SeenPod) -> bool:
    return not pod.gone and not pod.deleting and pod.phase == "Pending" and bool(pod.node)
