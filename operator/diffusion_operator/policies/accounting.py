"""`status.accounting`: what a job has cost so far. Every number can be computed again from status and pods."""

from __future__ import annotations

from diffusion_api.status import Accounting, JobStatus
from diffusion_operator import timestamps
from diffusion_operator.policies.run_policy import saved_something
from diffusion_operator.state import Case, SeenPod
from diffusion_operator.status import edit_attempt

LEAST_SECONDS = 60
"""Least seconds of held GPUs that are worth a status write of their own."""


def account(case: Case, status: JobStatus) -> JobStatus:
    """Return the status with the GPU time of the open attempt so far."""
    attempt = status.attempts[0] if status.attempts else None
    if attempt is None or attempt.ended_at is not None:
        return status
    pods = case.pods_of(attempt.number)
    held = round(sum(held_seconds(pod, case) for pod in pods) * gpus_of_a_pod(case), 1)
    if len(pods) < case.spec.resources.nodes:
        # After a restart of the operator pods that are gone are unknown; what was written down of them stays.
        held = max(held, attempt.gpu_seconds)
    if held == attempt.gpu_seconds:
        return status
    old = status.accounting or Accounting()
    more = held - attempt.gpu_seconds
    costs = _costs(case, old, more)
    total = round(old.gpu_seconds + more, 1)
    accounting = old.model_copy(update={"gpu_seconds": total, "costs": costs, "estimated_cost": _shown(costs)})
    return edit_attempt(status.model_copy(update={"accounting": accounting}), gpu_seconds=held)


def close_account(case: Case, status: JobStatus, *, completed: bool) -> JobStatus:
    """Return the status with what the attempt that ends here has kept and lost; `account` has been called.

    A step counts by the trainer's own speed, so that what was spent on preparation is neither.
    """
    attempt = status.attempts[0]
    old = status.accounting or Accounting()
    useful, lost = old.useful_gpu_seconds, old.lost_gpu_seconds
    if attempt.reached_step is not None and attempt.gpu_seconds:
        start = attempt.resumed_from_step or 0
        done = max(0, attempt.reached_step - start)
        latest = status.checkpoint.latest if status.checkpoint else None
        saved = attempt.reached_step if completed else latest.step if latest and saved_something(status) else 0
        kept = min(done, max(0, saved - start))
        price = _gpu_seconds_of_a_step(case, status, done=done)
        useful, lost = useful + kept * price, lost + (done - kept) * price
    changes: dict[str, float | None] = {"useful_gpu_seconds": round(useful, 1), "lost_gpu_seconds": round(lost, 1)}
    if old.gpu_seconds:
        changes["goodput"] = round(min(1.0, useful / old.gpu_seconds), 4)
    return status.model_copy(update={"accounting": old.model_copy(update=changes)})


def held_seconds(pod: SeenPod, case: Case) -> float:
    """Return for how long the pod has held its GPUs: from when its node took it up until its container's end, or now.

    Of a pod that vanished nothing later is known than that it is gone.
    """
    if pod.started_at is None:
        return 0
    finished_at = pod.terminated.get("finishedAt")
    end = timestamps.from_text(str(finished_at)) if finished_at else case.now
    return max(0.0, (end - timestamps.from_text(pod.started_at)).total_seconds())


def gpus_of_a_pod(case: Case) -> int:
    """Return the GPUs that each pod holds; 0 where the profile has none."""
    return case.spec.resources.gpus_per_node if case.profile.resource_name else 0


def worth_a_write(new: JobStatus, old: JobStatus, *, gpus: int) -> JobStatus:
    """Return `new`, or `old` where nothing differs but a little more GPU time."""
    if not new.attempts or not old.attempts:
        return new
    grown = new.attempts[0].gpu_seconds - old.attempts[0].gpu_seconds
    before = edit_attempt(
        new.model_copy(update={"accounting": old.accounting}), gpu_seconds=old.attempts[0].gpu_seconds
    )
    return old if before == old and grown < LEAST_SECONDS * gpus else new


def _gpu_seconds_of_a_step(case: Case, status: JobStatus, *, done: int) -> float:
    """Return what one of the `done` steps of the newest attempt cost, at most its share of all that was held."""
    if done == 0:
        return 0
    share = status.attempts[0].gpu_seconds / done
    speed = status.progress.samples_per_second if status.progress else None
    return min(share, case.spec.batch_size / speed * case.gpus) if speed else share


def _costs(case: Case, old: Accounting, gpu_seconds: float) -> dict[str, float]:
    """Return the costs with those of so many more GPU-seconds of the open attempt, at its own price."""
    price = case.profile.price
    hourly = None if price is None else price.spot if case.capacity == "Spot" else price.on_demand
    if price is None or hourly is None:
        return old.costs
    return old.costs | {price.currency: round(old.costs.get(price.currency, 0) + gpu_seconds / 3600 * hourly, 6)}


def _shown(costs: dict[str, float]) -> str | None:
    return " + ".join(f"{cost:.2f} {currency}" for currency, cost in sorted(costs.items())) or None
