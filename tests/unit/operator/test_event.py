"""Which events a status speaks of, and that their reasons are the documented ones."""

from datetime import timedelta

import pytest

from diffusion_api.outcomes import Cause
from diffusion_api.status import Attempt, JobStatus
from diffusion_operator.desired.event import REASONS, build, notices
from diffusion_operator.state import Job
from diffusion_operator.status import set_condition, set_pending
from testkit.builders import NOW, at, make_job


def reasons(status: JobStatus, *, seconds: float = 1) -> list[tuple[str, str]]:
    found = notices(status, now=NOW + timedelta(seconds=seconds))
    assert all(notice.reason in REASONS for notice in found)
    return [(notice.reason, notice.kind) for notice in found]


def holds(kind: str, value: str, reason: str = "R") -> JobStatus:
    return set_condition(JobStatus(), kind, value, reason=reason, message="m", generation=1, now=NOW)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "value", "reason", "told"),
    [
        ("Validated", "True", "Valid", [("Validated", "Normal")]),
        ("Validated", "False", "InvalidSpec", [("InvalidSpec", "Warning")]),
        ("Validated", "False", "ProfileNotFound", [("ProfileRefused", "Warning")]),
        ("Suspended", "True", "Suspended", [("Suspended", "Normal")]),
        ("Suspended", "False", "Resumed", [("Resumed", "Normal")]),
        ("Suspended", "False", "Suspending", []),
        ("PodsReady", "True", "Running", [("Running", "Normal")]),
        ("PodsReady", "False", "Waiting", []),
        ("Complete", "True", "Completed", [("Complete", "Normal")]),
        ("Failed", "True", "Crash", [("Failed", "Warning")]),
    ],
)
def test_conditions(kind: str, value: str, reason: str, told: list[tuple[str, str]]) -> None:
    assert reasons(holds(kind, value, reason)) == told


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (Cause.PREEMPTED, [("Preempted", "Normal")]),
        (Cause.NODE_LOST, [("Preempted", "Normal")]),
        (Cause.SUSPENDED, [("AttemptSuspended", "Normal")]),
        (Cause.CRASH, [("AttemptFailed", "Warning")]),
        (Cause.COMPLETED, []),
    ],
)
def test_ends_of_attempts(cause: Cause, told: list[tuple[str, str]]) -> None:
    attempt = Attempt(number=1, started_at=at(-10), ended_at=at(), cause=str(cause), message="m")
    assert reasons(JobStatus(attempts=(attempt,))) == [("AttemptStarted", "Normal"), *told]


def test_backoff_and_waiting() -> None:
    ended = Attempt(number=1, started_at=at(-10), ended_at=at(), cause="Hang")
    status = JobStatus(attempt=1, attempts=(ended,), next_attempt_at=at(10))
    assert ("BackOff", "Normal") in reasons(status)
    running = JobStatus(attempt=1, attempts=(Attempt(number=1, started_at=at(-10)),))
    waits = set_pending(running, cause="MissingSecret", detail="d", hint="h", now=NOW)
    assert reasons(waits)[-1] == ("Waiting", "Warning")


def test_old_news_is_not_told_again() -> None:
    assert reasons(holds("Complete", "True"), seconds=3600) == []


def test_names_are_unique_deterministic_and_valid_for_the_longest_job_names() -> None:
    first = Attempt(number=1, started_at=at(-30), ended_at=at(-20), cause="Hang")
    second = Attempt(number=2, started_at=at(-10), ended_at=at(), cause="Hang")
    status = JobStatus(attempts=(second, first))
    job = Job.read(make_job(name="x" * 253))
    names = [build(job, notice)["metadata"]["name"] for notice in notices(status, now=NOW)]
    assert len(set(names)) == len(names) == 4
    assert names == [build(job, notice)["metadata"]["name"] for notice in notices(status, now=NOW)]
    assert max(map(len, names)) < 253
