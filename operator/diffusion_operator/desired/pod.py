"""The pod of one rank of one attempt. Passes Pod Security `restricted`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion_api import names
from diffusion_api.job import JobSpec
from diffusion_api.resources import EnvVar, NodeCapacity
from diffusion_api.run import JobIdentity, Rendezvous, RunConfig
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.desired import placement
from diffusion_operator.desired.quantity import times
from diffusion_operator.state import Job, Object

COMMAND = ("python", "-m", "diffusion_trainer")
RUN_VOLUME, WORK_VOLUME, TMP_VOLUME, SHM_VOLUME, CREDENTIALS_VOLUME = "run", "work", "tmp", "shm", "credentials"
REQUIRED_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
LEFT_ALONE = {"karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
"""Autoscalers do not empty the pod's node to save money: that would cost GPU time. podOverrides.annotations wins."""
KEY_MODE = 0o440
"""Credentials are readable for the trainer's group (fsGroup) and nobody else."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What one attempt adds to its job."""

    number: int
    micro_batch_size: int | None
    """Bound on the micro-batch that earlier attempts found."""
    trainer_image: str
    """Image where the profile names none."""
    avoided_nodes: tuple[str, ...] = ()
    """Nodes on which an earlier attempt failed."""
    capacity: NodeCapacity = "OnDemand"
    """Kind of node that this attempt uses."""


def run_config(job: Job, spec: JobSpec, profile: ProfileSpec, *, attempt: Attempt, rank: int) -> RunConfig:
    """Return what the pod is told; the spec travels as the user wrote it."""
    return RunConfig(
        job=JobIdentity(name=job.name, namespace=job.namespace, uid=job.uid),
        attempt=attempt.number,
        node_rank=rank,
        nodes=spec.resources.nodes,
        processes_per_node=spec.resources.gpus_per_node,
        rendezvous=rendezvous(job, attempt.number) if spec.resources.nodes > 1 else None,
        device=profile.device,
        micro_batch_size=attempt.micro_batch_size,
        grace_period_seconds=profile.termination_grace_period_seconds,
        stall_seconds=spec.run_policy.stall_seconds,
        spec=spec.trainer_part(),
    )


def rendezvous(job: Job, attempt: int) -> Rendezvous:
    """Return where the pods of an attempt meet; the name is looked up in the pods' own namespace."""
    host = f"{names.pod_name(job.name, attempt, 0)}.{names.service_name(job.name)}"
    return Rendezvous(host=host, port=names.RENDEZVOUS_PORT)


def build(job: Job, spec: JobSpec, profile: ProfileSpec, *, attempt: Attempt, rank: int) -> Object:
    """Return the manifest of the pod."""
    overrides = spec.pod_overrides
    run = run_config(job, spec, profile, attempt=attempt, rank=rank)
    pod_spec: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": profile.termination_grace_period_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": names.TRAINER_UID,
            "runAsGroup": names.TRAINER_UID,
            "fsGroup": names.TRAINER_UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, profile, image=profile.image or attempt.trainer_image)],
        "volumes": _volumes(spec, profile),
        "tolerations": placement.tolerations(spec, profile, capacity=attempt.capacity),
    }
    optional = {
        "nodeSelector": placement.node_selector(spec, profile, capacity=attempt.capacity),
        "affinity": placement.affinity(profile, capacity=attempt.capacity, avoided=attempt.avoided_nodes)
        | _apart(job, spec, attempt.number),
        "runtimeClassName": profile.runtime_class_name,
        "serviceAccountName": spec.credentials.service_account_name,
        "priorityClassName": overrides.priority_class_name,
        "schedulerName": overrides.scheduler_name,
        "imagePullSecrets": [{"name": secret.name} for secret in overrides.image_pull_secrets],
    }
    if spec.resources.nodes > 1:
        optional |= {
            "hostname": names.pod_name(job.name, attempt.number, rank),
            "subdomain": names.service_name(job.name),
        }
    pod_spec |= {key: value for key, value in optional.items() if value}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": names.pod_name(job.name, attempt.number, rank),
            "namespace": job.namespace,
            "labels": overrides.labels | labels(job, attempt=attempt.number, rank=rank),
            "annotations": LEFT_ALONE
            | overrides.annotations
            | {
                # With its nulls: `snrGamma: null` is something else than no snrGamma.
                names.ANNOTATION_RUN: run.model_dump_json(by_alias=True),
                names.ANNOTATION_DEFAULT_CONTAINER: names.TRAINER_CONTAINER,
            },
            "ownerReferences": [owner(job)],
        },
        "spec": pod_spec,
    }


def labels(job: Job, *, attempt: int, rank: int) -> dict[str, str]:
    """Return the labels by which a pod is found and recognised."""
    return {
        names.LABEL_NAME: names.TRAINER_APP,
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_JOB_NAME: job.name,
        names.LABEL_JOB_UID: job.uid,
        names.LABEL_ATTEMPT: str(attempt),
        names.LABEL_RANK: str(rank),
    }


def _apart(job: Job, spec: JobSpec, attempt: int) -> Object:
    """Return the affinity that gives each pod of an attempt a node of its own; empty for a single pod."""
    if spec.resources.nodes == 1:
        return {}
    siblings = {names.LABEL_JOB_UID: job.uid, names.LABEL_ATTEMPT: str(attempt)}
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": siblings}}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def owner(job: Job) -> Object:
    """Return the reference by which the garbage collector deletes the pod with its job."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.JOB_KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        # True would need the right to update the job's finalizers.
        "blockOwnerDeletion": False,
    }


def _container(spec: JobSpec, profile: ProfileSpec, *, image: str) -> Object:
    mounts = [
        {"name": RUN_VOLUME, "mountPath": names.RUN_DIR, "readOnly": True},
        {"name": WORK_VOLUME, "mountPath": names.WORK_DIR},
        {"name": TMP_VOLUME, "mountPath": "/tmp"},  # noqa: S108 - the pod's own
        {"name": SHM_VOLUME, "mountPath": "/dev/shm"},  # noqa: S108
    ]
    if spec.credentials.secret_ref:
        mounts.append({"name": CREDENTIALS_VOLUME, "mountPath": names.CREDENTIALS_DIR, "readOnly": True})
    return {
        "name": names.TRAINER_CONTAINER,
        "image": image,
        "command": list(COMMAND),
        "env": _environment(profile.env, spec.pod_overrides.env),
        "ports": [{"name": names.METRICS_PORT_NAME, "containerPort": names.METRICS_PORT, "protocol": "TCP"}],
        "resources": _resources(spec, profile),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _environment(*given: tuple[EnvVar, ...]) -> list[Object]:
    """Return the environment; later lists win over earlier ones, the operator's own over all."""
    merged: dict[str, Object] = {}
    for variables in given:
        merged |= {variable.name: {"value": variable.value} for variable in variables}
    merged |= {
        names.ENV_RUN_FILE: {"value": f"{names.RUN_DIR}/{names.RUN_FILE}"},
        names.ENV_CREDENTIALS_DIR: {"value": names.CREDENTIALS_DIR},
        names.ENV_WORK_DIR: {"value": names.WORK_DIR},
        names.ENV_TERMINATION_LOG: {"value": names.TERMINATION_LOG},
        # Libraries keep caches at home, and the root file system is read-only.
        "HOME": {"value": names.WORK_DIR},
        "NODE_NAME": {"valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        "POD_IP": {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    }
    return [{"name": name, **source} for name, source in merged.items()]


def _resources(spec: JobSpec, profile: ProfileSpec) -> Object:
    """Return requests and limits; without GPUs, `perGpu` is meant per process."""
    count = spec.resources.gpus_per_node
    per_gpu = profile.per_gpu
    bounded = {"memory": times(per_gpu.memory, count), "ephemeral-storage": times(per_gpu.ephemeral_storage, count)}
    if profile.resource_name:
        bounded[profile.resource_name] = str(count)
    return {"requests": {"cpu": times(per_gpu.cpu, count), **bounded}, "limits": bounded}


def _volumes(spec: JobSpec, profile: ProfileSpec) -> list[Object]:
    disk = times(profile.per_gpu.ephemeral_storage, spec.resources.gpus_per_node)
    run = {"path": names.RUN_FILE, "fieldRef": {"fieldPath": f"metadata.annotations['{names.ANNOTATION_RUN}']"}}
    volumes: list[dict[str, Any]] = [
        {"name": RUN_VOLUME, "downwardAPI": {"items": [run]}},
        {"name": WORK_VOLUME, "emptyDir": {"sizeLimit": disk}},
        {"name": TMP_VOLUME, "emptyDir": {}},
        {"name": SHM_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": profile.shared_memory}},
    ]
    if spec.credentials.secret_ref:
        volumes.append({"name": CREDENTIALS_VOLUME, "projected": _credentials(spec.credentials.secret_ref.name)})
    return volumes


def _credentials(secret: str) -> Object:
    """Return the projection of the known keys: the Secret and the pair of keys must be there, others may be missing.

    One source per key, because `optional` speaks of the Secret and its keys alike.
    """
    sources: list[Object] = []
    for key in names.SECRET_KEYS:
        source: Object = {"name": secret, "items": [{"key": key, "path": key}]}
        sources.append({"secret": source if key in REQUIRED_KEYS else source | {"optional": True}})
    return {"defaultMode": KEY_MODE, "sources": sources}
