"""Pods that the API server does not take."""

from __future__ import annotations

from typing import Any

from testkit.builders import merge
from testkit.kube import Object
from testkit.recording.clouds import GFD, PROFILE
from testkit.recording.plant import NAMESPACE
from testkit.recording.situation import Situations
from testkit.recording.stage import Stage
from testkit.waiting import wait_until

SITUATIONS = Situations()
CLOUD = GFD.preset


def _refused(stage: Stage, **more: Any) -> None:
    """Have a pod refused. Policies and limits count a moment after they are made, so until then it is tried again."""

    def tried() -> bool:
        stage.submit(CLOUD, PROFILE, **more)
        if not stage.refusal:
            for name in stage.pods:
                stage.kube.api.delete("pods", name, namespace=NAMESPACE, grace_seconds=0)
                stage.kube.wait_gone("pods", name, namespace=NAMESPACE)
            stage.pods.clear()
        return bool(stage.refusal)

    wait_until(tried, describe="the pod to be refused", timeout=30)


def _quota(stage: Stage, name: str, **hard: str) -> None:
    """Make a quota and wait until the controller has counted what is used of it."""
    limits = {key.replace("_", "."): value for key, value in hard.items()}
    limits = {key.replace("gpu", "nvidia.com/gpu"): value for key, value in limits.items()}
    stage.make("resourcequotas", {"metadata": {"name": name}, "spec": {"hard": limits}}, namespace=NAMESPACE)
    stage.kube.wait_for(
        "resourcequotas",
        name,
        lambda found: (found.get("status") or {}).get("used", {}).keys() == limits.keys(),
        namespace=NAMESPACE,
        timeout=60,
    )


@SITUATIONS("QuotaExceeded", "gpu-quota", hint=("gpu-quota",))
def quota_of_gpus(stage: Stage) -> None:
    """The namespace may have no GPUs beyond those that it has."""
    _quota(stage, "gpu-quota", requests_gpu="2")
    _refused(stage, gpus=4)


@SITUATIONS("QuotaExceeded", "memory-quota", hint=("memory-quota",))
def quota_of_memory(stage: Stage) -> None:
    """The quota allows the GPUs, and not the memory."""
    _quota(stage, "memory-quota", requests_gpu="8", requests_memory="16Gi")
    _refused(stage)


@SITUATIONS("QuotaExceeded", "pod-quota", hint=("pod-quota",))
def quota_of_pods(stage: Stage) -> None:
    """The namespace may have no more pods."""
    _quota(stage, "pod-quota", pods="0")
    _refused(stage)


@SITUATIONS("AdmissionRejected", "must specify limits.cpu")
def quota_that_wants_limits(stage: Stage) -> None:
    """The quota counts limits of CPU, which no pod of ours has: nothing is used up, and no pod is let in."""
    _quota(stage, "limits-quota", limits_cpu="100")
    _refused(stage)


@SITUATIONS("MissingServiceAccount", "trainer", hint=("kubectl create serviceaccount trainer",))
def service_account_missing(stage: Stage) -> None:
    """The service account does not exist."""
    _refused(stage, credentials={"serviceAccountName": "trainer"})


@SITUATIONS("MissingPriorityClass", "urgent")
def priority_class_missing(stage: Stage) -> None:
    """The priority class does not exist."""
    _refused(stage, podOverrides={"priorityClassName": "urgent"})


@SITUATIONS("MissingRuntimeClass", "nvidia", hint=("RuntimeClass nvidia",))
def runtime_class_missing(stage: Stage) -> None:
    """The profile's runtime class does not exist."""
    _refused(stage, changed={"runtimeClassName": "nvidia"})


@SITUATIONS("AdmissionRejected", "runtimeClass.scheduling.nodeSelector[pool]")
def runtime_class_contradicts(stage: Stage) -> None:
    """The runtime class wants other nodes than the user."""
    scheduling = {"nodeSelector": {"pool": "sandboxed"}}
    stage.make("runtimeclasses", {"metadata": {"name": "gvisor"}, "handler": "gvisor", "scheduling": scheduling})
    _refused(stage, changed={"runtimeClassName": "gvisor"}, podOverrides={"nodeSelector": {"pool": "training"}})


def _on_the_host(manifest: Object) -> Object:
    """Return the pod as a webhook changes it that mounts a folder of the host."""
    volume = {"name": "cache", "hostPath": {"path": "/mnt/cache"}}
    return merge(manifest, {"spec": {"volumes": [*manifest["spec"]["volumes"], volume]}})


def _with_sidecar(manifest: Object) -> Object:
    """Return the pod as a webhook changes it that adds a container which sets up the network."""
    security = {"capabilities": {"add": ["NET_ADMIN"]}}
    container = {"name": "mesh-init", "image": "mesh/init:1", "securityContext": security}
    return merge(manifest, {"spec": {"initContainers": [container]}})


@SITUATIONS("PodSecurityRejected", "hostPath")
def pod_security_volume(stage: Stage) -> None:
    """A webhook adds a volume that the namespace's level does not allow."""
    _refused(stage, alter=_on_the_host)


@SITUATIONS("PodSecurityRejected", "mesh-init")
def pod_security_sidecar(stage: Stage) -> None:
    """A mesh adds a container that the namespace's level does not allow."""
    _refused(stage, alter=_with_sidecar)


@SITUATIONS("AdmissionRejected", "maximum memory usage")
def limit_range(stage: Stage) -> None:
    """The namespace's LimitRange allows less memory."""
    limits = [{"type": "Container", "max": {"memory": "8Gi"}}]
    stage.make("limitranges", {"metadata": {"name": "small"}, "spec": {"limits": limits}}, namespace=NAMESPACE)
    _refused(stage)


@SITUATIONS("AdmissionRejected", "cost-center")
def policy(stage: Stage) -> None:
    """A policy of the cluster wants a label."""
    rules = [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]
    spec = {
        "matchConstraints": {"resourceRules": rules},
        "validations": [
            {"expression": "has(object.metadata.labels.cost_center)", "message": "label cost-center is required"}
        ],
    }
    stage.make("validatingadmissionpolicies", {"metadata": {"name": "cost-center"}, "spec": spec})
    binding = {"policyName": "cost-center", "validationActions": ["Deny"]}
    stage.make("validatingadmissionpolicybindings", {"metadata": {"name": "cost-center"}, "spec": binding})
    _refused(stage)


@SITUATIONS("AdmissionRejected", "failed calling webhook", hint=("webhook",))
def webhook_down(stage: Stage) -> None:
    """A webhook that must be asked does not answer."""
    rules = [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]
    webhook = {
        "name": "pods.policy.example.com",
        "clientConfig": {"url": "https://127.0.0.1:9/validate"},
        "rules": rules,
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": 2,
    }
    stage.make("validatingwebhookconfigurations", {"metadata": {"name": "policy"}, "webhooks": [webhook]})
    _refused(stage)
