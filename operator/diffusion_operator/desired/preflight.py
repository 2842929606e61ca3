"""The pod of a preflight: the trainer's image and credentials on any node, without a GPU."""

from __future__ import annotations

from diffusion_api import names
from diffusion_api.job import JobSpec
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.desired import pod, pod_group
from diffusion_operator.state import Job, Object

COMMAND = (*pod.COMMAND, "--preflight")
DEADLINE_SECONDS = 600
"""After so long the kubelet ends it: a store that never answers must not hold a job up for ever."""
GRACE_SECONDS = 5
REQUESTS = {"cpu": "250m", "memory": "512Mi", "ephemeral-storage": "1Gi"}
LIMITS = {"memory": "4Gi", "ephemeral-storage": "8Gi"}
"""Room for the sample of images, of up to 200 MiB each, and for decoding eight of the largest at once."""
_VOLUMES = (pod.RUN_VOLUME, pod.WORK_VOLUME, pod.TMP_VOLUME, pod.CREDENTIALS_VOLUME)
_OF_THE_PROFILE = ("affinity", "nodeSelector", "runtimeClassName", "schedulerName", "tolerations")
"""What takes a pod to GPU nodes, and a scheduler that may wait for a whole gang of them."""


def build(job: Job, spec: JobSpec, profile: ProfileSpec, *, number: int, trainer_image: str) -> Object:
    """Return the manifest of the preflight's `number`-th pod, from 0. Passes Pod Security `restricted`.

    What the user set in podOverrides is kept, but for queues and gangs: nothing that they share out is asked for. What
    the profile says of nodes and devices is not.
    """
    attempt = pod.Attempt(number=1, micro_batch_size=None, trainer_image=trainer_image)
    manifest = pod.build(job, spec, profile, attempt=attempt, rank=0)
    metadata, content = manifest["metadata"], manifest["spec"]
    metadata["name"] = names.preflight_name(job.name, number)
    metadata["annotations"] = pod_group.alone(metadata["annotations"])
    metadata["labels"] = pod_group.alone(spec.pod_overrides.labels) | pod.labels(
        job, attempt=names.PREFLIGHT_ATTEMPT, rank=number
    )
    for key in _OF_THE_PROFILE:
        content.pop(key, None)
    overrides = spec.pod_overrides
    content |= {
        "activeDeadlineSeconds": DEADLINE_SECONDS,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "tolerations": [one.to_json_object() for one in overrides.tolerations],
        "volumes": [volume for volume in content["volumes"] if volume["name"] in _VOLUMES],
    }
    if overrides.node_selector:
        content["nodeSelector"] = overrides.node_selector
    container = content["containers"][0]
    container |= {"command": list(COMMAND), "resources": {"requests": dict(REQUESTS), "limits": dict(LIMITS)}}
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] in _VOLUMES]
    del container["ports"]
    return manifest
