"""`runPolicy.pendingDeadlineSeconds`: how long an attempt, or the preflight before the first, may wait for its pods."""

from __future__ import annotations

from datetime import datetime

from diffusion_api import names
from diffusion_api.outcomes import OF_CAUSE, Cause
from diffusion_operator import timestamps
from diffusion_operator.policies.attempt_starts import is_starting
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.policies.pending import why_preflight_waits, why_waiting
from diffusion_operator.state import Case


def seconds_left(case: Case) -> float | None:
    """Return what is left of the deadline; None without one, and where nothing is waited for."""
    limit, since = case.spec.run_policy.pending_deadline_seconds, waits_since(case)
    if limit is None or since is None:
        return None
    return limit - (case.now - since).total_seconds()


def waits_since(case: Case) -> datetime | None:
    """Return since when pods are waited for; None where all run, or have run."""
    attempt = case.job.open_attempt
    pods = case.pods_of(attempt.number if attempt else names.PREFLIGHT_ATTEMPT)
    waiting = [pod for pod in pods if pod.phase == "Pending" and pod.live(case.now)]
    if attempt is not None:
        missing = is_starting(case) and len(pods) < case.spec.resources.nodes
        placement = case.status.placement
        # Over all choices that were tried since the job last ran.
        since = placement.waits_since if placement is not None else attempt.started_at
        return timestamps.from_text(since) if waiting or missing else None
    created = [pod.raw["metadata"].get("creationTimestamp") for pod in waiting]
    return min((timestamps.from_text(text) for text in created if text), default=None)


def ending(case: Case) -> Ending:
    """Return how the job ends at this deadline, with what its pods waited for and what can be done about that."""
    outcome = OF_CAUSE[Cause.PENDING_DEADLINE_EXCEEDED]
    message = f"{outcome.explanation}, which is {case.spec.run_policy.pending_deadline_seconds}"
    attempt = case.job.open_attempt
    pods = case.pods_of(attempt.number if attempt else names.PREFLIGHT_ATTEMPT)
    if attempt is None:
        found = why_preflight_waits(case, pods[0]) if pods else None
    else:
        found = why_waiting(case, pods) if pods else None
    why = found or case.status.pending
    if why is None:
        return Ending(cause=outcome.cause, message=f"{message}; nothing is known to have been in their way")
    return Ending(cause=outcome.cause, message=f"{message}; {why.cause}: {why.detail}; {why.hint}")
