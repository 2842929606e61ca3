"""The headless Service of a job with several nodes: its pods get names that stay, by which they find each other."""

from __future__ import annotations

from diffusion_api import names
from diffusion_operator.desired.pod import owner
from diffusion_operator.state import Job, Object


def build(job: Job) -> Object:
    """Return the manifest: one for all attempts, since the names of pods hold their number."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": names.service_name(job.name),
            "namespace": job.namespace,
            "labels": {
                names.LABEL_NAME: names.TRAINER_APP,
                names.LABEL_MANAGED_BY: names.MANAGED_BY,
                names.LABEL_JOB_NAME: job.name,
                names.LABEL_JOB_UID: job.uid,
            },
            "ownerReferences": [owner(job)],
        },
        "spec": {
            "clusterIP": "None",
            "selector": {names.LABEL_JOB_UID: job.uid},
            # Pods look for each other before they are ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": names.RENDEZVOUS_PORT_NAME, "port": names.RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }
