"""An image that cannot be pulled: what containerd and the registry say, put into a few kinds."""

from __future__ import annotations

import re
from typing import Any

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting import events, reading
from diffusion_operator.policies.waiting.events import Said
from diffusion_operator.policies.waiting.facts import Diagnosis, diagnosis

REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)

_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("name", ("invalid reference format", "InvalidImageName", "couldn't parse image")),
    ("rate limit", ("429 Too Many Requests", "toomanyrequests", "rate limit", "pull QPS exceeded")),
    ("disk", ("no space left on device",)),
    ("platform", ("no match for platform", "no matching manifest", "exec format error")),
    (
        "unauthorized",
        (
            "401 Unauthorized",
            "403 Forbidden",
            "authorization failed",
            "failed to authorize",
            "pull access denied",
            "unauthorized",
            "no basic auth credentials",
            "denied",
        ),
    ),
    (
        "unreachable",
        (
            "no such host",
            "i/o timeout",
            "connection refused",
            "connection reset",
            "TLS handshake timeout",
            "x509:",
            "context deadline exceeded",
            "network is unreachable",
            "503 Service Unavailable",
            "502 Bad Gateway",
            "500 Internal Server Error",
            "server misbehaving",
            "EOF",
        ),
    ),
    ("not found", ("not found", "manifest unknown", "NAME_UNKNOWN", "does not exist")),
)
"""The first kind any of whose words is said. Registries that need an account hide missing images behind `denied`, and
`unauthorized` says so; an unreachable token server is `failed to authorize` with a network error inside."""
_PULL_SECRET = re.compile(r"Unable to retrieve some image pull secrets \(([^)]{1,1000})\)")
_NETWORK = ("no such host", "i/o timeout", "connection refused", "x509:", "TLS handshake timeout")


def why_not_pulled(pod: Any, status: Any, about: list[Said]) -> Diagnosis:
    """Return why the image of the container with this status cannot be pulled. `about`: the pod's events."""
    waiting = reading.mapping(status, "state", "waiting")
    reason, said = reading.text(waiting, "reason"), reading.text(waiting, "message")
    image = _image(pod, status)
    failed = [entry for entry in about if entry.reason in {"Failed", "InspectFailed"} and "image" in entry.message]
    # Before Kubernetes 1.33 the status while backing off does not repeat why.
    message = said if _kind(f"{reason}: {said}") or not failed else failed[-1].message
    kind = _kind(f"{reason}: {message}")
    secrets = events.newest(about, "FailedToRetrieveImagePullSecret")
    missing = _PULL_SECRET.search(secrets.message) if secrets is not None else None
    if kind == "unauthorized" and missing is not None:
        detail = f"Secret {missing[1]} cannot be read, and without it: {message}"
        return diagnosis(WaitingCause.MISSING_SECRET, detail, "pull", name=missing[1])
    found = {"image": image or "<image>", "node": reading.text(pod, "spec", "nodeName") or "<node>"}
    return diagnosis(WaitingCause.IMAGE_PULL_FAILED, f"{reason}: {message or image}", kind, **found)


def _kind(message: str) -> str:
    if "failed to authorize" in message and any(words in message for words in _NETWORK):
        return "unreachable"
    return next((kind for kind, words in _KINDS if any(word in message for word in words)), "")


def _image(pod: Any, status: Any) -> str:
    name = reading.text(status, "name")
    both = [*reading.entries(pod, "spec", "containers"), *reading.entries(pod, "spec", "initContainers")]
    return reading.text(status, "image") or next(
        (reading.text(entry, "image") for entry in both if reading.text(entry, "name") == name), ""
    )
