"""The end of an attempt: evidence, cause, action."""

from __future__ import annotations

from datetime import timedelta

from diffusion_api.outcomes import Action
from diffusion_api.run import LastWord
from diffusion_api.status import MAX_LAST_LINES, Accounting, JobStatus, OutputStatus
from diffusion_operator import timestamps
from diffusion_operator.policies.attempt_starts import is_starting, open_next
from diffusion_operator.policies.evidence import ending_of
from diffusion_operator.policies.leftovers import leftovers
from diffusion_operator.policies.run_policy import Verdict, describe_wait, judge
from diffusion_operator.policies.validation import accepted
from diffusion_operator.state import Case, Decision, SeenPod
from diffusion_operator.status import count, edit_attempt, set_condition, short, take_report

SUSPENDING = "Suspending"


def attempt_ended(case: Case) -> Decision | None:
    """Close the attempt when its pods have ended, and complete, fail, go on at once or back off."""
    attempt = case.job.open_attempt
    if attempt is None:
        return None
    pods = case.pods_of(attempt.number)
    if is_starting(case) and len(pods) < case.spec.resources.nodes:
        return None  # what is missing has not been created yet
    running = tuple(pod for pod in pods if pod.live(case.now))
    if running and len(running) == len(pods):
        return None
    if running:
        # One ended rank ends the attempt for all: the others wait for it in vain. Where nothing is left to be done they
        # are about to end by themselves.
        done = all(pod.completed for pod in pods if pod not in running)
        stopping = () if done else tuple(pod for pod in running if not pod.deleting)
        return Decision(rule="attemptEnded", delete=stopping, again_seconds=seconds_to_stuck(running, case))
    status, verdict = close(case)
    if verdict.action == Action.RESUME:
        return open_next(case, status, rule="attemptEnded")
    status = back_off(case, status, verdict) if verdict.action == Action.BACK_OFF else finish(case, status, verdict)
    return Decision(rule="attemptEnded", status=status, delete=leftovers(case), again_seconds=verdict.wait_seconds)


def seconds_to_stuck(pods: tuple[SeenPod, ...], case: Case) -> float | None:
    """Return when to look again at pods that are being deleted, in case their node never answers."""
    ends = [pod.raw["metadata"]["deletionTimestamp"] for pod in pods if pod.deleting]
    left = [(timestamps.from_text(end) - case.now).total_seconds() for end in ends]
    return max(1.0, max(left) + 31) if left else None


def close(case: Case) -> tuple[JobStatus, Verdict]:
    """Return the status with the attempt closed, and what follows from its end."""
    attempt = case.status.attempts[0]
    pods = case.pods_of(attempt.number)
    condition = case.job.condition("Suspended")
    stopped = case.spec.suspend or (condition is not None and condition.reason == SUSPENDING)
    ending = ending_of(pods, stopped=stopped, now=case.now)
    status = accepted(case)
    # Of steps and checkpoints rank 0 knows most, so it has the last word.
    for report in (case.seen.heard.report, *(pod.last_word for pod in reversed(pods))):
        if report is not None:
            status = take_report(status, report)
    verdict = judge(status, case.spec, ending)
    status = _account(case, status, pods)
    status = edit_attempt(
        status,
        ended_at=timestamps.to_text(case.now),
        cause=str(verdict.cause),
        exit_code=ending.exit_code,
        message=short(verdict.message),
        last_lines=ending.word.last_lines[-MAX_LAST_LINES:] if ending.word else "",
        nodes=nodes_of(pods) or attempt.nodes,
    )
    status = count(status, **verdict.counted)
    status = _say(status, case, "PodsReady", "AttemptEnded", f"attempt {attempt.number} has ended: {verdict.cause}")
    return status, verdict


def finish(case: Case, status: JobStatus, verdict: Verdict) -> JobStatus:
    """Return the final status."""
    return _complete(case, status, verdict) if verdict.action == Action.SUCCEED else _fail(case, status, verdict)


def _complete(case: Case, status: JobStatus, verdict: Verdict) -> JobStatus:
    word = _word(case)
    warnings = f" ({'; '.join(word.warnings)})" if word and word.warnings else ""
    message = short(verdict.message + warnings)
    output = OutputStatus(uri=case.spec.output.destination, files=word.output if word else ())
    status = status.model_copy(
        update={"phase": "Complete", "message": message, "output": output, "next_attempt_at": None}
    )
    status = _say(status, case, "Progressing", "Complete", message)
    return set_condition(
        status, "Complete", "True", reason="Completed", message=message, generation=case.job.generation, now=case.now
    )


def _fail(case: Case, status: JobStatus, verdict: Verdict) -> JobStatus:
    message = short(verdict.message)
    status = status.model_copy(update={"phase": "Failed", "message": message, "next_attempt_at": None})
    status = _say(status, case, "Progressing", "Failed", message)
    return set_condition(
        status, "Failed", "True", reason=verdict.reason, message=message, generation=case.job.generation, now=case.now
    )


def back_off(case: Case, status: JobStatus, verdict: Verdict) -> JobStatus:
    """Return the status of a job whose next attempt waits."""
    then = timestamps.to_text(case.now + timedelta(seconds=verdict.wait_seconds))
    message = short(f"{verdict.cause}: {verdict.message}; {describe_wait(verdict.wait_seconds)}")
    status = status.model_copy(update={"phase": "Interrupted", "message": message, "next_attempt_at": then})
    return _say(status, case, "Progressing", "BackOff", message)


def nodes_of(pods: tuple[SeenPod, ...]) -> tuple[str, ...]:
    """Return the nodes of pods, in the order of the pods, which is that of the ranks."""
    return tuple(pod.node for pod in pods if pod.node)


def _account(case: Case, status: JobStatus, pods: tuple[SeenPod, ...]) -> JobStatus:
    """Return the status with the GPU time of the ended attempt: from when its nodes took it up until its end."""
    starts = [pod.started_at for pod in pods if pod.started_at]
    ends = [str(pod.terminated["finishedAt"]) for pod in pods if pod.terminated.get("finishedAt")]
    held = 0.0
    if starts:
        end = max(map(timestamps.from_text, ends)) if ends else case.now
        held = max(0.0, (end - min(map(timestamps.from_text, starts))).total_seconds()) * case.gpus
    old = status.accounting or Accounting()
    total = old.gpu_seconds + held
    accounting = old.model_copy(
        update={
            "gpu_seconds": round(total, 1),
            "lost_gpu_seconds": round(old.lost_gpu_seconds + held * _lost_share(status), 1),
            "estimated_cost": _cost(case, total),
        }
    )
    return status.model_copy(update={"accounting": accounting})


def _lost_share(status: JobStatus) -> float:
    """Return the share of the attempt's steps that no checkpoint holds, 0 where it is not known."""
    attempt, checkpoint = status.attempts[0], status.checkpoint
    if attempt.reached_step is None or attempt.resumed_from_step is None:
        return 0
    done = attempt.reached_step - attempt.resumed_from_step
    saved = checkpoint.latest.step if checkpoint and checkpoint.latest else 0
    return min(1.0, max(0, attempt.reached_step - saved) / done) if done > 0 else 0


def _cost(case: Case, gpu_seconds: float) -> str | None:
    price = case.snapshot.price if case.snapshot else None
    if price is None:
        return None
    hourly = price.spot if case.spec.resources.capacity == "Spot" else price.on_demand
    return None if hourly is None else f"{gpu_seconds / 3600 * hourly:.2f} {price.currency}"


def _word(case: Case) -> LastWord | None:
    pods = case.pods_of(case.status.attempt)
    return next((pod.last_word for pod in pods if pod.last_word is not None), None)


def _say(status: JobStatus, case: Case, kind: str, reason: str, message: str) -> JobStatus:
    return set_condition(
        status, kind, "False", reason=reason, message=message, generation=case.job.generation, now=case.now
    )
