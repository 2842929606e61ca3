"""Kubernetes Events about a job, derived from its status: the same status gives the same events under the same names.

So an event whose creation a crash prevented is made up for, and one that exists already is a 409. The reasons are an
interface: alerts and people match on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from diffusion_api import names
from diffusion_api.outcomes import Cause
from diffusion_api.status import Attempt, Condition, JobStatus
from diffusion_operator import timestamps
from diffusion_operator.state import Job, Object

COMPONENT = names.MANAGED_BY
RECENT = timedelta(minutes=10)
"""Older transitions are not told any more: the API server keeps an event for an hour by default."""
MAX_MESSAGE = 1000

NORMAL, WARNING = "Normal", "Warning"

REASONS: dict[str, str] = {
    "Validated": "the job can be run",
    "InvalidSpec": "the job cannot be run; the message names field, value and remedy",
    "ProfileRefused": "the profile does not exist, or does not allow what the job asks for",
    "PreflightPassed": "storage, dataset, model and destination can be used; the message says what was found",
    "PreflightFailed": "a preflight did not pass; the message says why, and the job's phase whether it is tried again",
    "Waiting": "an attempt waits for something; the message says for what and what can be done",
    "AttemptStarted": "the pods of an attempt were asked for",
    "Running": "all pods of the attempt run",
    "Preempted": "the attempt had to make room; the next one starts at once and nothing is counted",
    "MovedOn": "no node came in time for the profile and capacity that were tried; the next of them is",
    "AttemptFailed": "the attempt ended by a failure; the message says why",
    "AttemptSuspended": "the attempt was stopped because the job is suspended",
    "BackOff": "the next attempt waits",
    "Suspended": "no pod runs until the job is resumed",
    "Resumed": "the job goes on after a suspension",
    "Complete": "all steps are done and the weights are exported",
    "Failed": "the job has failed for good",
}


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One thing worth telling."""

    reason: str
    key: str
    """Tells this notice from others of the same reason; part of the event's name."""
    message: str
    at: str
    kind: str = NORMAL


def notices(status: JobStatus, *, now: datetime) -> list[Notice]:
    """Return everything recent that the status tells of, oldest first."""
    found = [notice for condition in status.conditions for notice in _of_condition(condition, status)]
    found += [notice for attempt in reversed(status.attempts) for notice in _of_attempt(attempt)]
    waits = status.phase == "Preflight" or (bool(status.attempts) and status.attempts[0].ended_at is None)
    if status.pending is not None and waits:
        detail = f"{status.pending.cause}: {status.pending.detail}; {status.pending.hint}"
        key = f"{status.attempt}-{status.pending.cause.lower()}"
        found.append(Notice(reason="Waiting", key=key, message=detail, at=status.pending.since, kind=WARNING))
    if status.next_attempt_at is not None and status.attempts and status.attempts[0].ended_at:
        message = f"attempt {status.attempt + 1} starts at {status.next_attempt_at}"
        found.append(Notice(reason="BackOff", key=str(status.attempt), message=message, at=status.attempts[0].ended_at))
    recent = [notice for notice in found if now - timestamps.from_text(notice.at) <= RECENT]
    return sorted(recent, key=lambda notice: notice.at)


def _of_condition(condition: Condition, status: JobStatus) -> Iterator[Notice]:
    at = condition.last_transition_time
    key = _digits(at)
    told = {
        ("Validated", "True"): ("Validated", NORMAL),
        ("Validated", "False"): ("InvalidSpec" if condition.reason == "InvalidSpec" else "ProfileRefused", WARNING),
        ("PreflightPassed", "True"): ("PreflightPassed", NORMAL),
        ("PreflightPassed", "False"): ("PreflightFailed", WARNING),
        ("Suspended", "True"): ("Suspended", NORMAL),
        ("Complete", "True"): ("Complete", NORMAL),
        ("Failed", "True"): ("Failed", WARNING),
    }
    if (condition.type, condition.status) in told:
        reason, kind = told[condition.type, condition.status]
        yield Notice(reason=reason, key=key, message=condition.message, at=at, kind=kind)
    if (condition.type, condition.status, condition.reason) == ("Suspended", "False", "Resumed"):
        yield Notice(reason="Resumed", key=key, message=condition.message, at=at)
    if (condition.type, condition.status) == ("PodsReady", "True"):
        message = f"attempt {status.attempt} runs"
        yield Notice(reason="Running", key=str(status.attempt), message=message, at=at)


def _of_attempt(attempt: Attempt) -> Iterator[Notice]:
    key = str(attempt.number)
    message = f"attempt {attempt.number} starts"
    yield Notice(reason="AttemptStarted", key=key, message=message, at=attempt.started_at)
    if attempt.ended_at is None or attempt.cause is None or attempt.cause == Cause.COMPLETED:
        return
    reason, kind = "AttemptFailed", WARNING
    if attempt.cause in {Cause.PREEMPTED, Cause.NODE_LOST}:
        reason, kind = "Preempted", NORMAL
    elif attempt.cause == Cause.NO_CAPACITY:
        reason, kind = "MovedOn", NORMAL
    elif attempt.cause == Cause.SUSPENDED:
        reason, kind = "AttemptSuspended", NORMAL
    text = f"attempt {attempt.number}: {attempt.cause}: {attempt.message}"
    yield Notice(reason=reason, key=key, message=text, at=attempt.ended_at, kind=kind)


def build(job: Job, notice: Notice) -> Object:
    """Return the manifest of the event. Its name is a function of job and notice."""
    stem = job.name[:80].rstrip("-.")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{stem}.{job.uid[:8]}.{notice.reason.lower()}.{notice.key}",
            "namespace": job.namespace,
        },
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.JOB_KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
        },
        "reason": notice.reason,
        "message": notice.message[:MAX_MESSAGE],
        "type": notice.kind,
        "firstTimestamp": notice.at,
        "lastTimestamp": notice.at,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": COMPONENT,
    }


def _digits(instant: str) -> str:
    return "".join(character for character in instant if character.isdigit())
