"""`status.pending`: why a pod does not run yet, as one cause with a hint. Waiting uses up no attempt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.state import Object, SeenPod

Why = tuple[str, str, str]
"""(cause, detail, hint)"""

IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
MISSING_SECRET = re.compile(r"(secret \"[^\"]+\" not found|references non-existent secret key)", re.IGNORECASE)
MISSING_CLAIM = re.compile(r"persistentvolumeclaim \"[^\"]+\" not found", re.IGNORECASE)

_INSUFFICIENT = "Insufficient {}"
_NO_MATCH = ("didn't match Pod's node affinity/selector", "untolerated taint")


def why_waiting(pod: SeenPod, events: tuple[Object, ...], profile: ProfileSpec) -> Why | None:
    """Return why the pod waits; None where nothing stands in its way that is known of."""
    if not pod.node:
        return _why_not_scheduled(pod, profile)
    waiting = pod.waiting
    reason, message = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
    if reason in IMAGE:
        hint = "check the profile's image and podOverrides.imagePullSecrets"
        return "ImagePullFailed", f"{reason}: {message}", hint
    if reason in CONFIG:
        return "ContainerConfigError", f"{reason}: {message}", "the message names what is missing or refused"
    return _why_not_mounted(pod, events)


def _why_not_scheduled(pod: SeenPod, profile: ProfileSpec) -> Why | None:
    condition = pod.condition("PodScheduled")
    if condition.get("status") != "False":
        return None
    reason, message = str(condition.get("reason", "")), str(condition.get("message", ""))
    if reason == "SchedulingGated":
        return "SchedulingGated", message or "the pod has scheduling gates", "whoever set the gates must remove them"
    if profile.resource_name and _INSUFFICIENT.format(profile.resource_name) in message:
        hint = f"wait for {profile.resource_name} to become free, use another profile, or add nodes"
        return "InsufficientGPU", message, hint
    if "Insufficient " in message:
        return "InsufficientResources", message, "use a profile that asks for less cpu or memory, or add nodes"
    if any(words in message for words in _NO_MATCH):
        hint = "no node fits the profile's nodeAffinity, the capacity, podOverrides.nodeSelector and the tolerations"
        return "TaintOrSelectorMismatch", message, hint
    return "Unschedulable", message, "the message is the Kubernetes scheduler's"


def _why_not_mounted(pod: SeenPod, events: tuple[Object, ...]) -> Why | None:
    """Return what keeps the pod's volumes from being mounted: only events tell."""
    mounts = [event for event in events if event.get("reason") in {"FailedMount", "FailedAttachVolume"}]
    about = [event for event in mounts if event["involvedObject"].get("uid") == pod.raw["metadata"].get("uid")]
    if not about:
        return None
    message = str(max(about, key=_last_seen).get("message", ""))
    if MISSING_SECRET.search(message):
        hint = "create the Secret, or the key in it, that spec.credentials.secretRef names; the pod goes on by itself"
        return "MissingSecret", message, hint
    if MISSING_CLAIM.search(message):
        return "MissingVolume", message, "create the claim that the message names; the pod goes on by itself"
    return "MountFailed", message, "the message is the kubelet's"


def _last_seen(event: Mapping[str, Any]) -> str:
    series: Mapping[str, Any] = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")
