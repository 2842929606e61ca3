"""What autoscalers say: the cluster autoscaler, GKE's, Karpenter and EKS Auto Mode.

Their newest word counts. `TriggeredScaleUp` and `Nominated` promise a node, and a promise that is not kept in time is a
finding of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
_LIMIT = ("max node group size reached", "max cluster", "max limit reached", "limit reached")
_BACKOFF = "in backoff after failed scale-up"
_NO_CAPACITY = ("out of resources", "RESOURCE_POOL_EXHAUSTED", "InsufficientInstanceCapacity", "insufficient capacity")
_QUOTA = ("quota exceeded", "QUOTA_EXCEEDED", "LimitExceeded", "QuotaExceeded", "quota")
_POOL_LIMIT = ("exceed limits for nodepool", "limits have been exhausted", "would exceed limit")
_TOO_SMALL = (
    "has enough resources",
    "had enough resources",
    "have enough resources",
    "had the required resources",
    "no instance type satisfied resources",
)
_NO_OFFERING = ("the required offering", "a required offering")
_NO_LABELS = ("incompatible requirements", "did not tolerate", "met the scheduling requirements")


def why_not_scaled(facts: WaitingFacts, pod: Any, *, now: datetime) -> Diagnosis | None:
    """Return what the autoscaler is at; None where there is none or it only repeats what the scheduler says."""
    about = [said for said in events.about_pod(facts.events, pod) if said.fresh(now, PROMISE + events.FRESH)]
    return _cloud_has_none(facts, about, now=now) or _newest_word(facts, about, now=now)


def _newest_word(facts: WaitingFacts, about: list[Said], *, now: datetime) -> Diagnosis | None:
    words = [said for said in about if _judgement(said) is not None]
    if not words:
        return None
    newest = words[-1]
    if newest.reason in {"TriggeredScaleUp", "Nominated"}:
        return _promised(newest, now=now)
    if not newest.fresh(now):
        return None
    failed = events.newest(words, "FailedScaleUp")
    if newest.reason == "NotTriggerScaleUp" and _BACKOFF in newest.message and failed is not None:
        newest = failed
    return _refused(facts, newest)


def _judgement(said: Said) -> Said | None:
    """Return the event if an autoscaler gave it; kube-scheduler's FailedScheduling is none."""
    if said.reason in {"TriggeredScaleUp", "NotTriggerScaleUp", "FailedScaleUp", "Nominated"}:
        return said
    karpenter = said.message.startswith("Failed to schedule pod") or "karpenter" in said.source
    return said if said.reason == "FailedScheduling" and karpenter else None


def _promised(said: Said, *, now: datetime) -> Diagnosis:
    if said.fresh(now, PROMISE):
        return diagnosis(_C.NODE_PROVISIONING, said.message)
    minutes = int((now - said.at) / timedelta(minutes=1))
    return diagnosis(_C.AUTOSCALER_REFUSED, f"no node came in {minutes} minutes after: {said.message}", "late")


def _refused(facts: WaitingFacts, said: Said) -> Diagnosis | None:
    if said.reason == "FailedScaleUp":
        return _failed(facts, said)
    if said.reason == "NotTriggerScaleUp":
        return _cluster_autoscaler(said)
    return _karpenter(facts, said)


def _failed(facts: WaitingFacts, said: Said) -> Diagnosis:
    if _any(said.message, _NO_CAPACITY):
        return _shortage(facts, said.message)
    if _any(said.message, _QUOTA):
        return diagnosis(_C.AUTOSCALER_REFUSED, said.message, "quota")
    late = "failed to appear in time" in said.message
    return diagnosis(_C.AUTOSCALER_REFUSED, said.message, "late" if late else "")


def _cluster_autoscaler(said: Said) -> Diagnosis | None:
    reasons = messages.autoscaler(said.message)
    if any(reason.says(*_LIMIT) for reason in reasons):
        return diagnosis(_C.AUTOSCALER_REFUSED, said.message, "limit")
    if any(reason.says(_BACKOFF) for reason in reasons):
        return diagnosis(_C.AUTOSCALER_REFUSED, said.message)
    fits = [reason for reason in reasons if reason.says(messages.INSUFFICIENT)]
    return diagnosis(_C.AUTOSCALER_REFUSED, said.message, "size") if fits else None


def _karpenter(facts: WaitingFacts, said: Said) -> Diagnosis | None:
    """Judge by the NodePool that came nearest: its limits, its offerings, its sizes; labels come last."""
    pools = _pools(said.message)
    if any(_any(pool, _POOL_LIMIT) for pool in pools):
        return diagnosis(_C.AUTOSCALER_REFUSED, said.message, "limit")
    candidates = [pool for pool in pools if not _any(pool, ("incompatible requirements", "did not tolerate"))]
    if any(_any(pool, _NO_OFFERING) and not _any(pool, ("met the scheduling requirements or",)) for pool in candidates):
        return _shortage(facts, said.message)
    if any(_any(pool, _TOO_SMALL) for pool in candidates):
        return diagnosis(_C.AUTOSCALER_REFUSED, said.message, "size")
    return diagnosis(_C.AUTOSCALER_REFUSED, said.message) if candidates else None


def _pools(message: str) -> list[str]:
    body = message.removeprefix("Failed to schedule pod,").strip()
    return [part.strip() for part in body.split(";") if part.strip()]


def _cloud_has_none(facts: WaitingFacts, about: list[Said], *, now: datetime) -> Diagnosis | None:
    """Return the shortage that the failed NodeClaims of this pod tell of: Karpenter tries again without end."""
    claims = [match[1] for said in about if said.reason == "Nominated" for match in _CLAIM.finditer(said.message)]
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
