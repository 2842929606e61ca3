"""`runPolicy.maxGPUHours`, and `limits.maxGPUHours` of the profile: over all attempts, the running one included."""

from __future__ import annotations

from diffusion_api.outcomes import OF_CAUSE, Cause
from diffusion_operator.policies.accounting import account, gpus_of_a_pod
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.state import Case

HOUR = 3600


def seconds_left(case: Case) -> float | None:
    """Return for how long what is left of the GPU time lasts; None without a limit, and while no GPU is held."""
    limit = _limit(case)
    if limit is None:
        return None
    left = limit * HOUR - _used_seconds(case)
    if left <= 0:
        return 0
    running = [pod for pod in case.live_pods if pod.started_at and pod.attempt == case.status.attempt]
    holding = len(running) * gpus_of_a_pod(case)
    return left / holding if holding else None


def ending(case: Case) -> Ending:
    """Return how the job ends when the time is used up."""
    outcome = OF_CAUSE[Cause.GPU_HOURS_EXCEEDED]
    used = _used_seconds(case) / HOUR
    message = f"{outcome.explanation}: {used:.2f} of {_limit(case):g}; {outcome.remedy}"
    return Ending(cause=outcome.cause, message=message)


def _limit(case: Case) -> float | None:
    given = (case.spec.run_policy.max_gpu_hours, case.profile.limits.max_gpu_hours)
    return min((hours for hours in given if hours is not None), default=None)


def _used_seconds(case: Case) -> float:
    accounting = account(case, case.status).accounting
    return accounting.gpu_seconds if accounting else 0
