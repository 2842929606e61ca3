"""`spec.runPolicy`: what follows from the end of an attempt. `outcomes.py` has the actions; here are the budgets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import islice

from diffusion_api.job import JobSpec
from diffusion_api.outcomes import (
    HANG_BUDGET,
    INFRASTRUCTURE_BUDGET,
    OF_CAUSE,
    RETUNE_BUDGET,
    SHORT_OF_ROOM,
    SHORT_OF_ROOM_BUDGET,
    Action,
    Cause,
)
from diffusion_api.status import Attempt, JobStatus
from diffusion_operator import timestamps
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.state import Case, Decision
from diffusion_operator.status import count, duration

FIRST_BACKOFF_SECONDS = 10
LONGEST_BACKOFF_SECONDS = 300
JITTER = 0.5
EXHAUSTED = "BackoffLimitExceeded"
STREAKS = ("infrastructure", "failures_since_checkpoint")
"""Counters that a new checkpoint sets back."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows from an ended attempt."""

    action: Action
    """SUCCEED, FAIL, RESUME (start at once) or BACK_OFF (start after `wait_seconds`)."""
    cause: Cause
    reason: str
    """Reason of the condition Failed, where it fails."""
    message: str
    counted: dict[str, int] = field(default_factory=dict)
    """Increments of counters."""
    wait_seconds: float = 0
    micro_batch_size: int | None = None
    """Bound for the attempts to come; None leaves it as it is."""


def judge(status: JobStatus, spec: JobSpec, ending: Ending) -> Verdict:
    """Return the verdict. `status` has heard the attempt's last word; its newest attempt is the one that ended.

    A new checkpoint shows that the job gets on: streaks of failures begin anew, whatever ended the attempt.
    """
    if not saved_something(status):
        return _judge(status, spec, ending)
    gone = {name: getattr(status.counters, name) for name in STREAKS}
    verdict = _judge(count(status, **{name: -number for name, number in gone.items()}), spec, ending)
    counted = {name: verdict.counted.get(name, 0) - gone.get(name, 0) for name in (*verdict.counted, *gone)}
    return replace(verdict, counted={name: number for name, number in counted.items() if number})


def _judge(status: JobStatus, spec: JobSpec, ending: Ending) -> Verdict:
    action = OF_CAUSE[ending.cause].action
    if action == Action.RESUME:
        counted = {"preemptions": 1} if ending.cause not in {Cause.SUSPENDED, Cause.NO_CAPACITY} else {}
        return _verdict(Action.RESUME, ending, counted=counted)
    if action in {Action.BACK_OFF, Action.IGNORE}:
        # Ignored is what a fenced attempt says; that its successor must be started is not.
        return _infrastructure(status, ending)
    if action == Action.RETRY:
        return _retry(status, spec, ending)
    if action == Action.RETUNE:
        return _retune(status, spec, ending)
    return _verdict(action, ending)


def _infrastructure(status: JobStatus, ending: Ending) -> Verdict:
    streak = status.counters.infrastructure + 1
    counted = {"infrastructure": 1}
    if streak > INFRASTRUCTURE_BUDGET:
        message = f"{streak} times in a row without a new checkpoint: {ending.message}"
        return _verdict(Action.FAIL, ending, reason=EXHAUSTED, message=message, counted=counted)
    step = status.attempts[0].reached_step
    if ending.cause == Cause.HANG and _hung_at(status, step) >= HANG_BUDGET - 1:
        message = f"{HANG_BUDGET} times at step {step}: {ending.message}"
        return _verdict(Action.FAIL, ending, reason=EXHAUSTED, message=message, counted=counted)
    return _verdict(Action.BACK_OFF, ending, counted=counted, wait_seconds=backoff_seconds(streak))


def _retry(status: JobStatus, spec: JobSpec, ending: Ending) -> Verdict:
    streak = status.counters.failures_since_checkpoint + 1
    counted = {"failures": 1, "failures_since_checkpoint": 1}
    if ending.cause == Cause.CRASH and _same_as_before(status, ending):
        step = status.attempts[0].reached_step
        message = f"{OF_CAUSE[Cause.REPEATED_CRASH].explanation} (step {step}): {ending.message}"
        repeated = Ending(cause=Cause.REPEATED_CRASH, message=message, exit_code=ending.exit_code, word=ending.word)
        return _verdict(Action.FAIL, repeated, counted=counted)
    if ending.cause in SHORT_OF_ROOM:
        before = sum(attempt.cause == ending.cause for attempt in _failed_before(status, streak - 1))
        if before >= SHORT_OF_ROOM_BUDGET:
            return _verdict(Action.FAIL, ending, counted=counted)
    limit = spec.run_policy.backoff_limit
    if streak > limit:
        message = f"{streak} failures without a new checkpoint, spec.runPolicy.backoffLimit is {limit}; the last one: "
        return _verdict(Action.FAIL, ending, reason=EXHAUSTED, message=message + ending.message, counted=counted)
    return _verdict(Action.BACK_OFF, ending, counted=counted, wait_seconds=backoff_seconds(streak))


def _retune(status: JobStatus, spec: JobSpec, ending: Ending) -> Verdict:
    tried = _tried_micro_batch(status, spec, ending)
    retunes = status.placement.retunes if status.placement else status.counters.out_of_memory_retunes
    if retunes >= RETUNE_BUDGET or tried == 1:
        message = f"{ending.message} (micro-batch at most {tried}): {OF_CAUSE[ending.cause].remedy}"
        return _verdict(Action.FAIL, ending, message=message)
    verdict = _verdict(Action.RESUME, ending, counted={"out_of_memory_retunes": 1})
    return replace(verdict, micro_batch_size=tried // 2)


def _tried_micro_batch(status: JobStatus, spec: JobSpec, ending: Ending) -> int:
    """Return the micro-batch that did not fit: what the trainer says, else the most that it may have tried."""
    given = spec.training.micro_batch_size
    processes = spec.resources.nodes * spec.resources.gpus_per_node
    widest = given if isinstance(given, int) else -(-spec.batch_size // processes)
    said = ending.word.micro_batch_size if ending.word else None
    return min(size for size in (widest, status.micro_batch_size, said) if size is not None)


def backoff_seconds(times: int) -> float:
    """Return the pause after that many failures in a row: 10 s, doubled each time, at most 5 minutes."""
    return float(min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(times - 1, 10)))


def jittered(seconds: float, *, key: str) -> float:
    """Return a pause up to half as long again, in whole seconds, by the hash of the key.

    What fails many jobs at once must not have them all come back in one moment.
    """
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return float(round(seconds * (1 + JITTER * share)))


def saved_something(status: JobStatus) -> bool:
    """Return whether the newest attempt acknowledged a checkpoint of its own."""
    attempt, checkpoint = status.attempts[0], status.checkpoint
    if checkpoint is None or checkpoint.latest is None:
        return False
    if attempt.resumed_from_step is not None:
        return checkpoint.latest.step > attempt.resumed_from_step
    return timestamps.from_text(checkpoint.latest.time) >= timestamps.from_text(attempt.started_at)


def _failed_before(status: JobStatus, number: int) -> Iterable[Attempt]:
    """Return the attempts of that many failures before the newest attempt, as far as they are kept."""
    failed = (item for item in status.attempts[1:] if item.cause and OF_CAUSE[Cause(item.cause)].action == Action.RETRY)
    return islice(failed, number)


def _hung_at(status: JobStatus, step: int | None) -> int:
    """Return how many of the earlier attempts hung at that step."""
    if step is None:
        return 0
    return sum((item.cause, item.reached_step) == (Cause.HANG, step) for item in status.attempts[1:])


def _same_as_before(status: JobStatus, ending: Ending) -> bool:
    """Return whether the attempt before this one crashed with the same code at the same step.

    Only a step from the trainer's last word counts: polled progress is too coarse to tell two crashes apart.
    """
    if ending.word is None or ending.word.step is None:
        return False
    before: Attempt | None = next((attempt for attempt in status.attempts[1:] if attempt.cause == Cause.CRASH), None)
    return before is not None and (before.exit_code, before.reached_step) == (ending.exit_code, ending.word.step)


def _verdict(
    action: Action,
    ending: Ending,
    *,
    reason: str = "",
    message: str = "",
    counted: dict[str, int] | None = None,
    wait_seconds: float = 0,
) -> Verdict:
    return Verdict(
        action=action,
        cause=ending.cause,
        reason=reason or str(ending.cause),
        message=message or ending.message,
        counted=counted or {},
        wait_seconds=wait_seconds,
    )


def backs_off(case: Case) -> Decision | None:
    """Wait until the time that the status names; it is there and not in memory, so a restart does not shorten it."""
    if case.status.next_attempt_at is None:
        return None
    left = timestamps.from_text(case.status.next_attempt_at) - case.now
    if left <= timedelta(0):
        return None
    return Decision(rule="backoff", again_seconds=left.total_seconds())


def describe_wait(seconds: float) -> str:
    """Return the wait in words."""
    return f"the next attempt starts in {duration(seconds)}"
