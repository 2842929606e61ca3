"""Kueue: what its Workload says of the job. Reasons of Kueue 0.19 (KEP-10852); before it, sentences (0.17)."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting import reading
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts, diagnosis

_C = WaitingCause
EXACT_PLACES = 10
_OF_REASON = {
    "NoMatchingFlavor": _C.NO_MATCHING_FLAVOR,
    "WaitingForQuota": _C.WAITING_FOR_QUOTA,
    "ExceedsMaxQuota": _C.EXCEEDS_MAX_QUOTA,
    "TopologyPlacementFailed": _C.TOPOLOGY_PLACEMENT_FAILED,
    "WaitingForPreemptedWorkloads": _C.PREEMPTING_OTHERS,
    "WaitingForPodsReady": _C.WAITING_FOR_PODS_READY,
    "Suspended": _C.WORKLOAD_DEACTIVATED,
}
_SAYS: tuple[tuple[tuple[str, ...], WaitingCause, str], ...] = (
    (("Pending the preemption of",), _C.PREEMPTING_OTHERS, ""),
    (("PodsReady condition",), _C.WAITING_FOR_PODS_READY, ""),
    (("namespace doesn't match ClusterQueue selector",), _C.QUEUE_MISSING, "namespace"),
    (("is stopped", "is inactive", "doesn't exist or inactive"), _C.QUEUE_STOPPED, ""),
    (("doesn't exist", "terminating or missing"), _C.QUEUE_MISSING, ""),
    (("resources validation failed", "LimitRange", "not supported"), _C.QUEUE_MISCONFIGURED, ""),
    (("failed admission checks",), _C.WAITING_FOR_ADMISSION_CHECK, ""),
    (("no longer fits after processing another workload",), _C.WAITING_FOR_QUOTA, ""),
)
"""Any of the words, the cause, the variant of its hint; the first that is said."""
_QUEUE_GONE = re.compile(r"(LocalQueue|ClusterQueue) \S+ (doesn't exist|is terminating or missing|not found)")
_STOPPED = re.compile(r"(LocalQueue|ClusterQueue) \S+ is (stopped|inactive)|localQueue doesn't exist or inactive")
_SHORT = re.compile(
    r"insufficient (unused )?quota for (\S{1,317}) in flavor|"
    r"borrowing limit for (\S{1,317}) in flavor|"
    r"request for (\S{1,317}) in flavor"
)
_NO_FLAVOR = ("doesn't match node affinity", "untolerated taint", "unavailable in ClusterQueue", "flavor ")
_TOPOLOGY = ("topology", "Topology")


def is_judged(facts: WaitingFacts) -> bool:
    """Return whether Kueue has said anything of the job."""
    return bool(reading.entries(facts.workload, "status", "conditions"))


def is_admitted(facts: WaitingFacts) -> bool:
    """Return whether Kueue has let the job go."""
    return _holds(facts.workload, "Admitted")


def why_queued(facts: WaitingFacts) -> Diagnosis | None:
    """Return why Kueue has not admitted the job; None where there is no Workload or it is admitted."""
    workload = facts.workload
    if not isinstance(workload, dict) or not workload:
        return None
    found = {"workload": reading.name(workload), "namespace": reading.namespace(workload)}
    if _holds(workload, "Admitted"):
        return None
    if reading.dig(workload, "spec", "active") is False:
        return diagnosis(_C.WORKLOAD_DEACTIVATED, _deactivated(workload), **found)
    if _holds(workload, "QuotaReserved"):
        return _checks(workload, found)
    condition = reading.condition(workload, "QuotaReserved")
    reason, message = reading.text(condition, "reason"), reading.text(condition, "message")
    if not condition:
        # All that Kueue ever says of a LocalQueue that was stopped stands on the LocalQueue.
        cause, variant = _C.WAITING_FOR_QUOTA, ""
        message = "Kueue has not judged the job yet; where the queue was stopped, only kubectl get localqueue shows it"
    else:
        cause, variant = _judge(reason, message)
    place = _place(facts.queue_position) if isinstance(facts.queue_position, int) else ""
    queue = reading.text(workload, "spec", "queueName")
    detail = f"{place}{f'queue {queue}: ' if queue else ''}{message or reason}"
    return diagnosis(cause, detail, variant, **found)


def _place(before: int) -> str:
    """Return the place in words; a far one only roughly, because each change of the status is a write."""
    if before < EXACT_PLACES:
        return f"place {before + 1} in the queue; "
    return f"more than {before // EXACT_PLACES * EXACT_PLACES} are before it in the queue; "


def _holds(workload: Any, kind: str) -> bool:
    return reading.text(reading.condition(workload, kind), "status") == "True"


def _judge(reason: str, message: str) -> tuple[WaitingCause, str]:
    if reason in _OF_REASON:
        return _OF_REASON[reason], ""
    if _STOPPED.search(message):
        return _C.QUEUE_STOPPED, ""
    if _QUEUE_GONE.search(message):
        return _C.QUEUE_MISSING, ""
    for words, cause, variant in _SAYS:
        if any(word in message for word in words):
            return cause, variant
    if reason == "Misconfigured":
        return _C.QUEUE_MISCONFIGURED, ""
    return _assignment(message), ""


def _assignment(message: str) -> WaitingCause:
    """Return what `couldn't assign flavors to pod set ...` comes to.

    For each resource one flavor with quota that is only in use makes waiting worth while; a resource for which every
    flavor is too small settles it the other way.
    """
    used: dict[str, bool] = defaultdict(bool)
    for match in _SHORT.finditer(message):
        # Borrowing limits and maximal capacities do not pass by waiting; unused quota does.
        used[match[2] or match[3] or match[4]] |= bool(match[1])
    if any(not in_use for in_use in used.values()):
        return _C.EXCEEDS_MAX_QUOTA
    if used:
        return _C.WAITING_FOR_QUOTA
    if any(word in message for word in _TOPOLOGY):
        return _C.TOPOLOGY_PLACEMENT_FAILED
    if any(word in message for word in _NO_FLAVOR):
        return _C.NO_MATCHING_FLAVOR
    return _C.WAITING_FOR_QUOTA


def _checks(workload: Any, found: dict[str, str]) -> Diagnosis:
    said = [
        f"{reading.text(check, 'name')} is {reading.text(check, 'state')}: {reading.text(check, 'message')}".rstrip(
            ": "
        )
        for check in reading.entries(workload, "status", "admissionChecks")
        if reading.text(check, "state") != "Ready"
    ]
    detail = f"quota is reserved; {'; '.join(sorted(said)) or 'Kueue has not admitted the job yet'}"
    return diagnosis(_C.WAITING_FOR_ADMISSION_CHECK, detail, **found)


def _deactivated(workload: Any) -> str:
    said = (reading.condition(workload, kind) for kind in ("Evicted", "DeactivationTarget", "Requeued"))
    messages = [f"{reading.text(entry, 'reason')}: {reading.text(entry, 'message')}" for entry in said if entry]
    return messages[0] if messages else "spec.active of the Workload is false"
