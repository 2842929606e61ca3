"""A pod that has a node and does not run: volumes, sandbox, image, container. What the kubelet says (v1.36)."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting import events, images, nodes, reading
from diffusion_operator.policies.waiting.events import Said
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts, diagnosis

SLOW_PULL = timedelta(minutes=10)

_C = WaitingCause
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError"}
_SECRET = re.compile(
    r"secret \"([^\"]{1,253})\" not found|references non-existent secret key|"
    r"couldn't find key \S+ in Secret [^/\s]+/([^\s:]{1,253})",
    re.IGNORECASE,
)
_VOLUME = re.compile(r"for volume \"([^\"]{1,253})\"")
_CLAIM = re.compile(r"persistentvolumeclaim \"([^\"]{1,253})\" not found", re.IGNORECASE)
_UNBOUND = re.compile(r"PVC is not bound|PVC is being deleted|bound to non-existent|empty pvc.Spec.VolumeName")
_RUNTIME_CLASS = re.compile(r"RuntimeClass(?:\.node\.k8s\.io)? \"([^\"]{1,253})\" not found")
_PASSED = {"Pulling", "Pulled", "Created", "Started", "BackOff"}
"""Reasons of events that show that volumes are mounted and the sandbox stands."""
_ADDRESSES = ("failed to assign an IP address", "no IP addresses available", "no available IP", "IP space exhausted")
_RUNTIME = re.compile(r"no runtime for \"([^\"]{1,253})\" is configured")


def why_not_started(facts: WaitingFacts, pod: Any, *, now: datetime) -> Diagnosis:
    """Return what keeps a pod that has a node from running."""
    about = events.about_pod(facts.events, pod)
    for rule in (_container, _node, _mounts, _sandbox, _pulling):
        found = rule(facts, pod, about, now)
        if found is not None:
            return found
    node = reading.text(pod, "spec", "nodeName")
    return diagnosis(_C.STARTING, f"pod {reading.name(pod)} starts on node {node}", **reading.names_of(pod))


def _container(_facts: WaitingFacts, pod: Any, about: list[Said], _now: datetime) -> Diagnosis | None:
    for status in _statuses(pod):
        waiting = reading.mapping(status, "state", "waiting")
        reason, message = reading.text(waiting, "reason"), reading.text(waiting, "message")
        if reason in images.REASONS:
            return images.why_not_pulled(pod, status, about)
        if reason in _CONFIG:
            secret = _SECRET.search(message)
            if secret is not None:
                return diagnosis(_C.MISSING_SECRET, f"{reason}: {message}", name=secret[1] or secret[2] or "<name>")
            return diagnosis(_C.CONTAINER_CONFIG_ERROR, f"{reason}: {message}", **reading.names_of(pod))
    return None


def _statuses(pod: Any) -> list[Any]:
    both = [
        *reading.entries(pod, "status", "initContainerStatuses"),
        *reading.entries(pod, "status", "containerStatuses"),
    ]
    return sorted(both, key=lambda status: reading.text(status, "name"))


def _node(facts: WaitingFacts, pod: Any, _about: list[Said], _now: datetime) -> Diagnosis | None:
    wanted = reading.text(pod, "spec", "nodeName")
    for node in facts.nodes or ():
        if reading.name(node) == wanted and not nodes.ready(node):
            detail = f"pod {reading.name(pod)} is on node {wanted}, which is not ready: {nodes.trouble(node)}"
            return diagnosis(_C.NODE_NOT_READY, detail, node=wanted)
    return None


def _mounts(_facts: WaitingFacts, pod: Any, about: list[Said], now: datetime) -> Diagnosis | None:
    """Return the failing mount that says most; what came before the image or container began has passed."""
    failed = _since(about, {"FailedMount", "FailedAttachVolume", "FailedMapVolume"}, now)
    if not failed:
        return None
    # `timed out waiting for the condition` follows each failure and says nothing of its own.
    for said in reversed(failed):
        secret, claim = _SECRET.search(said.message), _CLAIM.search(said.message)
        if secret is not None:
            name = secret[1] or secret[2] or _secret_behind(pod, said.message)
            return diagnosis(_C.MISSING_SECRET, said.message, name=name)
        if claim is not None:
            found = reading.names_of(pod) | {"name": claim[1]}
            return diagnosis(_C.MISSING_PERSISTENT_VOLUME_CLAIM, said.message, **found)
        if "Multi-Attach error" in said.message:
            return diagnosis(_C.VOLUME_BINDING, said.message, "attached", **reading.names_of(pod))
        if _UNBOUND.search(said.message):
            return diagnosis(_C.VOLUME_BINDING, said.message, **reading.names_of(pod))
    telling = [said for said in failed if "unmounted volumes=" not in said.message]
    return diagnosis(_C.MOUNT_FAILED, (telling or failed)[-1].message, **reading.names_of(pod))


def _secret_behind(pod: Any, message: str) -> str:
    """Return the Secret of the volume that the message names: a missing key is reported without its Secret."""
    volume = _VOLUME.search(message)
    for entry in reading.entries(pod, "spec", "volumes"):
        if volume is not None and reading.text(entry, "name") == volume[1]:
            sources = [
                reading.text(source, "secret", "name") for source in reading.entries(entry, "projected", "sources")
            ]
            named = [name for name in [reading.text(entry, "secret", "secretName"), *sources] if name]
            return named[0] if named else volume[1]
    return "<name>"


def _sandbox(_facts: WaitingFacts, pod: Any, about: list[Said], now: datetime) -> Diagnosis | None:
    failed = _since(about, {"FailedCreatePodSandBox", "NetworkNotReady"}, now)
    if not failed:
        return None
    message = failed[-1].message
    missing, handler = _RUNTIME_CLASS.search(message), _RUNTIME.search(message)
    if missing is not None:
        return diagnosis(_C.MISSING_RUNTIME_CLASS, message, name=missing[1])
    if handler is not None:
        return diagnosis(_C.SANDBOX_FAILED, message, "runtime", **reading.names_of(pod))
    addresses = any(words in message for words in _ADDRESSES)
    return diagnosis(_C.SANDBOX_FAILED, message, "addresses" if addresses else "", **reading.names_of(pod))


def _since(about: list[Said], failures: set[str], now: datetime) -> list[Said]:
    """Return the fresh failures after the last sign that mounts and sandbox have passed."""
    passed = [said.at for said in about if said.reason in _PASSED]
    recent = [said for said in about if said.reason in failures and said.fresh(now)]
    return [said for said in recent if not passed or said.at > max(passed)]


def _pulling(_facts: WaitingFacts, pod: Any, about: list[Said], now: datetime) -> Diagnosis | None:
    stage = [said for said in about if said.reason in {"Pulling", "Pulled", "Created", "Started"}]
    if not stage or stage[-1].reason != "Pulling":
        return None
    begun = stage[-1]
    took = now - begun.at
    detail = f"{begun.message} since {begun.at:%H:%M:%S} UTC"
    return diagnosis(_C.IMAGE_PULL, detail, "slow" if took >= SLOW_PULL else "", **reading.names_of(pod))
