"""A pod without a node: gates, claims, autoscalers, and the nodes themselves."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

from diffusion_api import names
from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting import autoscaling, events, messages, placement, queued, reading
from diffusion_operator.policies.waiting.autoscaling import Verdict
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts, diagnosis
from diffusion_operator.policies.waiting.placement import Landscape

QUEUE_GATE = f"{names.KUEUE_PREFIX}admission"
JUDGED = timedelta(seconds=10)
"""Kueue has looked at a pod by then."""
UNSEEN = timedelta(seconds=60)
"""A scheduler that runs has looked at a pod by then."""
GANG = ("gang", "minCount", "sibling pods", "pod group is not ready", "PodGroup", "minAvailable", "minMember")

_C = WaitingCause
_MISSING_CLAIM = re.compile(r"persistentvolumeclaim \"([^\"]{1,253})\" not found", re.IGNORECASE)


def why_not_scheduled(facts: WaitingFacts, pod: Any, *, now: datetime) -> Diagnosis:
    """Return what keeps the pod from getting a node."""
    for found in (_gated(facts, pod, now=now), _preempting(facts, pod), _claims(facts, pod)):
        if found is not None:
            return found
    land = placement.survey(facts, pod, now=now)
    verdict = autoscaling.verdict(facts, pod, now=now, pools=land.pools if land is not None else frozenset())
    if verdict is not None and verdict.kind == "firm":
        return verdict.diagnosis
    if land is None:
        return verdict.diagnosis if verdict is not None else _by_message(facts, pod, now=now)
    return _weighed(land, verdict) or _by_message(facts, pod, now=now)


def _gated(facts: WaitingFacts, pod: Any, *, now: datetime) -> Diagnosis | None:
    gates = sorted(reading.text(gate, "name") for gate in reading.entries(pod, "spec", "schedulingGates"))
    foreign = [gate for gate in gates if gate and not gate.startswith(names.KUEUE_PREFIX)]
    if QUEUE_GATE in gates and (found := _queued(facts, pod, now=now)) is not None:
        return found
    if foreign:
        shown = ", ".join(foreign)
        return diagnosis(
            _C.GATED, f"pod {reading.name(pod)} has scheduling gates: {shown}", gates=shown, **reading.names_of(pod)
        )
    if QUEUE_GATE in gates and not queued.is_admitted(facts):
        queue = reading.text(pod, "metadata", "labels", names.LABEL_QUEUE)
        return diagnosis(_C.GATED, f"waits for Kueue; queue {queue or 'of the namespace'}", "queue")
    if gates:  # admitted; Kueue takes its gates away one by one
        return diagnosis(_C.STARTING, f"Kueue lets pod {reading.name(pod)} go", **reading.names_of(pod))
    return None


def _queued(facts: WaitingFacts, pod: Any, *, now: datetime) -> Diagnosis | None:
    """Return what Kueue says of a pod that it holds back; None where it says nothing."""
    created = reading.moment(pod, "metadata", "creationTimestamp")
    if created is not None and now - created < JUDGED and not queued.is_judged(facts):
        return diagnosis(_C.STARTING, f"Kueue looks at pod {reading.name(pod)}", **reading.names_of(pod))
    found = queued.why_queued(facts)
    if found is not None:
        return found
    composed = events.newest(events.about_pod(facts.events, pod), "ErrWorkloadCompose")
    if composed is not None and len(facts.pods) < facts.wanted:
        return diagnosis(_C.GANG_INCOMPLETE, composed.message, **reading.names_of(pod))
    return None


def _preempting(facts: WaitingFacts, pod: Any) -> Diagnosis | None:
    node = reading.text(pod, "status", "nominatedNodeName")
    # Since 1.36 a node is also nominated while its volumes are prepared: nothing was said against the pod then.
    if not node or not said_by_scheduler(facts, pod):
        return None
    detail = f"pods of lower priority on node {node} are being stopped for pod {reading.name(pod)}"
    return diagnosis(_C.PREEMPTING_OTHERS, detail, **reading.names_of(pod))


def said_by_scheduler(facts: WaitingFacts, pod: Any) -> str:
    """Return the scheduler's last sentence about the pod, from its condition or an event; empty where none is."""
    condition = reading.condition(pod, "PodScheduled")
    gated = reading.text(condition, "reason") == "SchedulingGated"  # the scheduler's only word where no gate is left
    if reading.text(condition, "status") == "False" and not gated and reading.text(condition, "message"):
        return reading.text(condition, "message")
    about = [said for said in events.about_pod(facts.events, pod) if said.reason == "FailedScheduling"]
    spoken = [said for said in about if not said.message.startswith("Failed to schedule pod")]
    return spoken[-1].message if spoken else ""


def _claims(facts: WaitingFacts, pod: Any) -> Diagnosis | None:
    message = said_by_scheduler(facts, pod)
    reasons = messages.scheduler(message)
    # Resources are filtered before volumes: nodes that lack some may be in the volume's zone.
    full = any(reason.says(messages.INSUFFICIENT) for reason in reasons)
    for reason in reasons:
        # Of unbound claims the scheduler also says `not found`, of something else: the claim's name decides.
        missing = _MISSING_CLAIM.search(reason.why)
        if missing is not None:
            found = reading.names_of(pod) | {"name": missing[1]}
            return diagnosis(_C.MISSING_PERSISTENT_VOLUME_CLAIM, message, **found)
        if reason.says(*messages.VOLUME_ZONE) and not full:
            return diagnosis(_C.VOLUME_BINDING, message, "zone", **reading.names_of(pod))
        if reason.says(*messages.VOLUME):
            return diagnosis(_C.VOLUME_BINDING, message, **reading.names_of(pod))
    return None


def _weighed(land: Landscape, verdict: Verdict | None) -> Diagnosis | None:
    """Return what nodes and autoscaler come to together; None where a node seems to have room."""
    if verdict is not None and verdict.kind == "limit" and land.fitting:
        return verdict.diagnosis
    found = placement.why_no_room(land)
    if verdict is None or found is None:
        return found
    absent = not land.both and not (land.selective and land.labelled)
    # The autoscaler's groups may be empty: what it says of them is then all there is to be known.
    counts = verdict.kind == "labels" or (verdict.kind == "size" and land.selective)
    return verdict.diagnosis if absent and counts else found


def _by_message(facts: WaitingFacts, pod: Any, *, now: datetime) -> Diagnosis:
    """Return what the scheduler's sentence alone tells."""
    message = said_by_scheduler(facts, pod)
    if not message:
        return _unseen(pod, now=now)
    if any(words in message for words in GANG):
        return diagnosis(_C.GANG_INCOMPLETE, message, **reading.names_of(pod))
    found = placement.by_reasons(facts, pod, message)
    return found or diagnosis(_C.UNKNOWN, message, **reading.names_of(pod))


def _unseen(pod: Any, *, now: datetime) -> Diagnosis:
    created = reading.moment(pod, "metadata", "creationTimestamp")
    scheduler = reading.text(pod, "spec", "schedulerName") or "default-scheduler"
    node, claims = reading.text(pod, "status", "nominatedNodeName"), _claimed(pod)
    if created is None or now - created < UNSEEN:
        return diagnosis(_C.STARTING, f"pod {reading.name(pod)} was just created", **reading.names_of(pod))
    if node and claims:
        detail = f"node {node} is chosen, and volumes are not there yet for {', '.join(claims)}"
        return diagnosis(_C.VOLUME_BINDING, detail, **reading.names_of(pod))
    if node:
        detail = f"node {node} is chosen for pod {reading.name(pod)}, and is being prepared"
        return diagnosis(_C.STARTING, detail, **reading.names_of(pod))
    detail = f"scheduler {scheduler} has said nothing about pod {reading.name(pod)}"
    return diagnosis(_C.UNKNOWN, detail, "scheduler", scheduler=scheduler)


def _claimed(pod: Any) -> list[str]:
    """Return the names of the claims that the pod mounts."""
    volumes = reading.entries(pod, "spec", "volumes")
    return sorted(filter(None, (reading.text(entry, "persistentVolumeClaim", "claimName") for entry in volumes)))
