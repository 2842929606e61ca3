"""What autoscalers say: the cluster autoscaler, GKE's, Karpenter and EKS Auto Mode.

Their newest word counts. `TriggeredScaleUp` and `Nominated` promise a node, and a promise that is not kept in time is a
finding of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting import events, messages
from diffusion_operator.policies.waiting.events import Said
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts, diagnosis

PROMISE = timedelta(minutes=20)
"""The cluster autoscaler gives a node 15 minutes (--max-node-provision-time), and looks once more."""
FAILURES = 2
"""So many machines that the cloud did not give make a shortage of what one may be chance."""

_C = WaitingCause
_CLAIM = re.compile(r"nodeclaim/([a-z0-9.-]{1,253})")
_POOL = re.compile(r"nodepool \"([^\"]{1,253})\"|NodePool=\"?([A-Za-z0-9.-]{1,253})")
_TAINT = re.compile(
    r"did not tolerate (?:taint[^a-zA-Z0-9]{1,3}(?:taint=)?)?([A-Za-z0-9./_-]+(?:=[^:;,\s]*)?:[A-Za-z]+)"
)
_LIMIT = ("max node group size reached", "max cluster", "limit reached")
_BACKOFF = "in backoff after failed scale-up"
_NO_CAPACITY = ("out of resources", "RESOURCE_POOL_EXHAUSTED", "InsufficientInstanceCapacity", "insufficient capacity")
_QUOTA = ("quota", "QUOTA", "Quota", "LimitExceeded")
_POOL_CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("limit", ("exceed limits for nodepool", "limits have been exhausted")),
    ("offering", ("has the required offering", "had enough resources, had a required offering")),
    ("size", ("type has enough resources", "had enough resources or had a", "offering had the required resources")),
)
"""How near a NodePool came to the pod, by Karpenter's words (v1.14, and the same in brackets since v0.32)."""


@dataclass(frozen=True)
class Verdict:
    """What an autoscaler last said."""

    diagnosis: Diagnosis
    kind: str
    """`firm` stands whatever the nodes look like; `limit`, `size` and `labels` may speak of groups that do not matter:
    the cluster autoscaler names every group that is full, also those that no pod of ours could use."""


def verdict(facts: WaitingFacts, pod: Any, *, now: datetime, pools: frozenset[str]) -> Verdict | None:
    """Return what the autoscaler is at; None where there is none or it has not spoken lately.

    `pools`: the NodePools of the nodes that fit the pod.
    """
    about = [said for said in events.about_pod(facts.events, pod) if said.fresh(now, PROMISE + events.FRESH)]
    shortage = _failed_claims(facts, about, now=now)
    if shortage is not None:
        return Verdict(shortage, "firm")
    words = [said for said in about if _is_word(said)]
    if not words:
        return None
    newest = words[-1]
    if newest.reason in {"TriggeredScaleUp", "Nominated"}:
        return Verdict(_promised(newest, now=now), "firm")
    return _refused(facts, words, pools) if newest.fresh(now) else None


def _refused(facts: WaitingFacts, words: list[Said], pools: frozenset[str]) -> Verdict | None:
    newest, failed = words[-1], events.newest(words, "FailedScaleUp")
    if newest.reason == "NotTriggerScaleUp" and _BACKOFF in newest.message and failed is not None:
        newest = failed
    if newest.reason == "FailedScaleUp":
        return Verdict(_failed(facts, newest), "firm")
    if newest.reason == "NotTriggerScaleUp":
        return _cluster_autoscaler(newest)
    return _karpenter(facts, newest, pools)


def _is_word(said: Said) -> bool:
    """Return whether an autoscaler said it: FailedScheduling is also kube-scheduler's."""
    if said.reason in {"TriggeredScaleUp", "NotTriggerScaleUp", "FailedScaleUp", "Nominated"}:
        return True
    karpenter = said.message.startswith("Failed to schedule pod") or "karpenter" in said.source
    return said.reason == "FailedScheduling" and karpenter


def _promised(said: Said, *, now: datetime) -> Diagnosis:
    if said.fresh(now, PROMISE):
        return diagnosis(_C.NODE_PROVISIONING, said.message)
    # No duration: a detail that changes with each look would be a status write with each look.
    return diagnosis(_C.AUTOSCALER_REFUSED, f"no node has come since {said.at:%H:%M} UTC: {said.message}", "late")


def _failed(facts: WaitingFacts, said: Said) -> Diagnosis:
    if _any(said.message, _NO_CAPACITY):
        return _shortage(facts, said.message)
    if _any(said.message, _QUOTA):
        return diagnosis(_C.AUTOSCALER_REFUSED, said.message, "quota")
    late = "failed to appear in time" in said.message
    return diagnosis(_C.AUTOSCALER_REFUSED, said.message, "late" if late else "")


def _cluster_autoscaler(said: Said) -> Verdict | None:
    reasons = messages.autoscaler(said.message)
    if any(reason.says(*_LIMIT) for reason in reasons):
        return Verdict(diagnosis(_C.AUTOSCALER_REFUSED, said.message, "limit"), "limit")
    if any(reason.says(_BACKOFF) for reason in reasons):
        return Verdict(diagnosis(_C.AUTOSCALER_REFUSED, said.message), "firm")
    if any(reason.says(messages.INSUFFICIENT) for reason in reasons):
        return Verdict(diagnosis(_C.AUTOSCALER_REFUSED, said.message, "size"), "size")
    taints = [messages.taint_in(reason) for reason in reasons if reason.says(*messages.TAINT)]
    gpu = [taint for taint in taints if _is_gpu(taint)]
    if gpu:
        return Verdict(diagnosis(_C.TAINT_OR_SELECTOR_MISMATCH, said.message, "taint", taint=gpu[0]), "labels")
    return None


def _karpenter(facts: WaitingFacts, said: Said, pools: frozenset[str]) -> Verdict:
    """Judge by the NodePool that came nearest.

    Limits are looked at before labels, so a pool at its limit need not be one for this pod: it is where nodes that fit
    are of it, or where no other pool came as near.
    """
    parts = [part.strip() for part in said.message.removeprefix("Failed to schedule pod,").split(";") if part.strip()]
    classes = {_class_of(part) for part in parts}
    limited = {found[1] or found[2] for part in parts if _class_of(part) == "limit" for found in _POOL.finditer(part)}
    if limited & pools:
        return Verdict(diagnosis(_C.AUTOSCALER_REFUSED, said.message, "limit"), "firm")
    if "offering" in classes:
        return Verdict(_shortage(facts, said.message), "firm")
    for kind in ("size", "limit"):
        if kind in classes:
            return Verdict(diagnosis(_C.AUTOSCALER_REFUSED, said.message, kind), "firm")
    taints = [found[1] for part in parts for found in _TAINT.finditer(part) if "incompatible requirements" not in part]
    gpu = [taint for taint in taints if _is_gpu(taint)]
    if gpu:
        return Verdict(diagnosis(_C.TAINT_OR_SELECTOR_MISMATCH, said.message, "taint", taint=gpu[0]), "labels")
    return Verdict(diagnosis(_C.AUTOSCALER_REFUSED, said.message), "labels")


def _class_of(part: str) -> str:
    if _any(part, ("incompatible requirements", "did not tolerate")):
        return "labels"
    return next((kind for kind, words in _POOL_CLASSES if _any(part, words)), "labels")


def _is_gpu(taint: str) -> bool:
    return "gpu" in taint.lower() or "accelerator" in taint.lower()


def _failed_claims(facts: WaitingFacts, about: list[Said], *, now: datetime) -> Diagnosis | None:
    """Return the shortage that the failed NodeClaims of this pod tell of: Karpenter tries again without end."""
    claims = [found[1] for said in about if said.reason == "Nominated" for found in _CLAIM.finditer(said.message)]
    failed = [
        said
        for said in events.about_claims(facts.events)
        if said.reason == "InsufficientCapacityError" and said.about in claims and said.fresh(now)
    ]
    if not failed:
        return None
    many = len({said.about for said in failed}) >= FAILURES
    return _shortage(facts, failed[-1].message) if many or failed[-1].about == claims[-1] else None


def _shortage(facts: WaitingFacts, message: str) -> Diagnosis:
    cause = _C.SPOT_UNAVAILABLE if facts.capacity == "Spot" else _C.CAPACITY_UNAVAILABLE
    return diagnosis(cause, message)


def _any(message: str, words: Iterable[str]) -> bool:
    return any(word in message for word in words)
