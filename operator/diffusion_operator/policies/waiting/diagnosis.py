"""The diagnosis of a job: of all its pods, the one whose cause is hardest to wait out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from diffusion_api.waiting import RANK, WaitingCause
from diffusion_operator.policies.waiting import queued, reading
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts, diagnosis
from diffusion_operator.policies.waiting.refused import why_refused
from diffusion_operator.policies.waiting.scheduling import why_not_scheduled
from diffusion_operator.policies.waiting.starting import why_not_started


def explain(facts: WaitingFacts, *, now: datetime) -> Diagnosis:
    """Return why the job's pods do not run. Pure, never raises, and the order of what is in `facts` does not matter.

    The order of judgement: a refusal of the API server; then each pod that waits: with a node what the kubelet says
    (`starting`), without one gates and Kueue, preemption, claims, autoscaler and nodes (`scheduling`). Of several pods
    the one speaks whose cause stands first in `WaitingCause`.
    """
    now = now if now.tzinfo else now.replace(tzinfo=UTC)
    pods = sorted((pod for pod in facts.pods if isinstance(pod, dict)), key=_order)
    if facts.refusal:
        return why_refused(facts.refusal, namespace=facts.namespace)
    waiting = [pod for pod in pods if _waits(pod)]
    if not waiting:
        return _none_waits(facts, pods)
    found = [_of_pod(facts, pod, now=now) for pod in waiting]
    first = min(found, key=lambda entry: RANK[entry.cause])
    placed = sum(1 for pod in pods if reading.text(pod, "spec", "nodeName"))
    if facts.wanted > 1 and 0 < placed < facts.wanted and RANK[first.cause] >= RANK[WaitingCause.NO_SUCH_NODE]:
        return diagnosis_with(first, f"{placed} of {facts.wanted} pods have a node; {first.detail}")
    return first


def diagnosis_with(found: Diagnosis, detail: str) -> Diagnosis:
    """Return the same diagnosis with another detail."""
    bounded = diagnosis(found.cause, detail)
    return Diagnosis(cause=found.cause, detail=bounded.detail, hint=found.hint)


def _order(pod: Any) -> tuple[str, str, str]:
    return reading.namespace(pod), reading.name(pod), reading.text(pod, "metadata", "uid")


def _waits(pod: Any) -> bool:
    if reading.dig(pod, "metadata", "deletionTimestamp"):
        return False
    return reading.text(pod, "status", "phase") in {"", "Pending"}


def _of_pod(facts: WaitingFacts, pod: Any, *, now: datetime) -> Diagnosis:
    if reading.text(pod, "spec", "nodeName"):
        return why_not_started(facts, pod, now=now)
    return why_not_scheduled(facts, pod, now=now)


def _none_waits(facts: WaitingFacts, pods: list[Any]) -> Diagnosis:
    queue = queued.why_queued(facts)
    if queue is not None:
        return queue
    if not pods:
        return diagnosis(WaitingCause.STARTING, "the pods are being created")
    ending = [reading.name(pod) for pod in pods if reading.dig(pod, "metadata", "deletionTimestamp")]
    if ending:
        return diagnosis(WaitingCause.UNKNOWN, f"pod {ending[0]} is being deleted", **reading.names_of(pods[0]))
    phases = ", ".join(f"{reading.name(pod)} {reading.text(pod, 'status', 'phase')}" for pod in pods)
    return diagnosis(WaitingCause.STARTING, f"no pod waits: {phases}", **reading.names_of(pods[0]))
