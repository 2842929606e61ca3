"""The status as a value: small pure edits, and what is kept when it grows too large."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from diffusion_api.run import LastWord, ProgressReport
from diffusion_api.status import (
    Attempt,
    BestCheckpoint,
    CheckpointStatus,
    Condition,
    JobStatus,
    LatestCheckpoint,
    Pending,
    Progress,
)
from diffusion_operator import timestamps

MAX_BYTES = 8 * 1024
MAX_TEXT = 1024
MINUTE, HOUR, DAY = 60, 3600, 86400

Value = Literal["True", "False", "Unknown"]


def short(text: str, limit: int = MAX_TEXT) -> str:
    """Return the text, cut at the end to at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def set_condition(  # noqa: PLR0913 - the fields of a condition
    status: JobStatus, kind: str, value: Value, *, reason: str, message: str, generation: int, now: datetime
) -> JobStatus:
    """Return the status with that condition; its transition time moves only with its value."""
    old = next((found for found in status.conditions if found.type == kind), None)
    unchanged = old is not None and old.status == value
    new = Condition(
        type=kind,
        status=value,
        reason=reason,
        message=short(message),
        observed_generation=generation,
        last_transition_time=old.last_transition_time if old is not None and unchanged else timestamps.to_text(now),
    )
    if old is None:
        return status.model_copy(update={"conditions": (*status.conditions, new)})
    kept = tuple(new if found.type == kind else found for found in status.conditions)
    return status.model_copy(update={"conditions": kept})


def is_finished(status: JobStatus) -> bool:
    """Return whether it says Complete or Failed, which is for ever."""
    return any(found.type in {"Complete", "Failed"} and found.status == "True" for found in status.conditions)


def set_pending(status: JobStatus, *, cause: str, detail: str, hint: str, now: datetime) -> JobStatus:
    """Return the status that says why it waits; `since` stays while the cause does."""
    old = status.pending
    since = old.since if old is not None and old.cause == cause else timestamps.to_text(now)
    pending = Pending(cause=cause, detail=short(detail), hint=short(hint), since=since)
    return status.model_copy(update={"pending": pending})


def edit_attempt(status: JobStatus, **changes: Any) -> JobStatus:
    """Return the status with changes to its newest attempt."""
    newest = status.attempts[0].model_copy(update=changes)
    return status.model_copy(update={"attempts": (newest, *status.attempts[1:])})


def add_attempt(status: JobStatus, attempt: Attempt, *, keep: int) -> JobStatus:
    """Return the status with one more attempt, the oldest dropped beyond `keep`."""
    attempts = (attempt, *status.attempts)[:keep]
    return status.model_copy(update={"attempt": attempt.number, "attempts": attempts})


def count(status: JobStatus, **increments: int) -> JobStatus:
    """Return the status with counters increased."""
    counters = status.counters
    new = {name: getattr(counters, name) + number for name, number in increments.items()}
    return status.model_copy(update={"counters": counters.model_copy(update=new)})


def take_report(status: JobStatus, report: ProgressReport | LastWord) -> JobStatus:
    """Return the status with what a trainer said of steps and checkpoints; what it left out stays."""
    progress = shown(report.progress) if report.progress else status.progress
    changes: dict[str, Any] = {
        "progress": progress,
        "checkpoint": _checkpoint(status.checkpoint, report.latest_checkpoint, report.best_checkpoint, progress),
    }
    status = status.model_copy(update=changes)
    step = report.step if isinstance(report, LastWord) else None
    reached = step if step is not None else report.progress.step if report.progress else None
    attempt: dict[str, Any] = {"resumed_from_step": report.resumed_from_step, "reached_step": reached}
    return edit_attempt(status, **{name: value for name, value in attempt.items() if value is not None})


def _checkpoint(
    old: CheckpointStatus | None,
    latest: LatestCheckpoint | None,
    best: BestCheckpoint | None,
    progress: Progress | None,
) -> CheckpointStatus | None:
    latest = latest or (old.latest if old else None)
    best = best or (old.best if old else None)
    if latest is None and best is None:
        return old
    saved = latest.step if latest else 0
    return CheckpointStatus(latest=latest, best=best, at_risk_steps=max(0, progress.step - saved) if progress else 0)


_ROUNDED = ("samples_per_second", "loss", "validation_loss", "clip_score", "kid", "learning_rate")


def shown(progress: Progress) -> Progress:
    """Return the progress as kubectl shows it: with strings, and numbers without digits that nobody reads.

    Exact values are in metrics.jsonl and in the trainer's metrics.
    """
    percentage = min(100, progress.step * 100 // progress.total_steps) if progress.total_steps > 0 else 0
    seconds = progress.estimated_remaining_seconds
    remaining = duration(seconds) if seconds is not None else ""
    numbers = {name: getattr(progress, name) for name in _ROUNDED}
    rounded = {name: value if value is None else float(f"{value:.4g}") for name, value in numbers.items()}
    words = {"percentage": percentage, "done": f"{percentage}%", "remaining": remaining}
    return progress.model_copy(update=rounded | words)


def duration(seconds: float) -> str:
    """Return a duration as kubectl writes ages: `41m`, `3h12m`, `2d4h`."""
    whole = max(0, int(seconds))
    if whole < MINUTE:
        return f"{whole}s"
    if whole < HOUR:
        return f"{whole // MINUTE}m"
    if whole < DAY:
        hours, minutes = divmod(whole // MINUTE, 60)
        return f"{hours}h{minutes}m" if minutes else f"{hours}h"
    days, hours = divmod(whole // HOUR, 24)
    return f"{days}d{hours}h" if hours else f"{days}d"


def sentence(progress: Progress) -> str:
    """Return the progress in words: `step 1830/4000, loss 0.0810, 41m left`."""
    parts = [f"step {progress.step}/{progress.total_steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.estimated_remaining_seconds is not None:
        parts.append(f"{duration(progress.estimated_remaining_seconds)} left")
    return ", ".join(parts)


def calm(new: JobStatus, old: JobStatus, *, least_seconds: float) -> JobStatus:
    """Return `new`, or `old` where nothing but progress differs and it is too early to say so again.

    Both times are the trainer's own, so no clock is needed and clocks need not agree.
    """
    if new.progress is None or old.progress is None or not _same_news(new, old):
        return new
    passed = timestamps.from_text(new.progress.last_updated_time) - timestamps.from_text(old.progress.last_updated_time)
    return old if 0 <= passed.total_seconds() < least_seconds else new


def _same_news(new: JobStatus, old: JobStatus) -> bool:
    def news(status: JobStatus) -> JobStatus:
        checkpoint = status.checkpoint.model_copy(update={"at_risk_steps": 0}) if status.checkpoint else None
        attempts = tuple(item.model_copy(update={"reached_step": None, "gpu_seconds": 0}) for item in status.attempts)
        changes = {"progress": None, "message": "", "checkpoint": checkpoint, "attempts": attempts, "accounting": None}
        return status.model_copy(update=changes)

    return news(new) == news(old)


def to_object(status: JobStatus) -> dict[str, Any]:
    """Return the status as JSON values of at most 8 KiB: the oldest words go first, facts stay."""
    for fewer in _ever_shorter(status):
        content = fewer.to_json_object()
        if size(content) <= MAX_BYTES:
            break
    return content


def size(content: Mapping[str, Any]) -> int:
    """Return the bytes of the JSON text."""
    return len(json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode())


def _ever_shorter(status: JobStatus) -> list[JobStatus]:
    """Return versions of the status, each shorter than the one before."""
    attempts = status.attempts
    versions = [status]
    for words in (512, 128, 0):
        # The newest attempt's words are what a person looks for: they stay longest.
        older = tuple(
            item.model_copy(
                update={
                    "last_lines": item.last_lines[-words:] if words else "",
                    "message": item.message[: words or 64],
                    "log": item.log if words else None,
                }
            )
            for item in attempts[1:]
        )
        versions.append(status.model_copy(update={"attempts": (*attempts[:1], *older)}))
    for kept in (2, 1):  # names of many nodes would push out what the budgets go by: causes and steps
        bare = tuple(item.model_copy(update={"nodes": ()}) for item in versions[-1].attempts[kept:])
        versions.append(status.model_copy(update={"attempts": (*versions[-1].attempts[:kept], *bare)}))
    shortest = versions[-1].attempts
    versions += [status.model_copy(update={"attempts": shortest[:kept]}) for kept in range(len(shortest) - 1, 0, -1)]
    if attempts:
        last = attempts[0].model_copy(
            update={"last_lines": attempts[0].last_lines[-128:], "message": attempts[0].message[:256], "log": None}
        )
        versions.append(status.model_copy(update={"attempts": (last,)}))
    return versions
