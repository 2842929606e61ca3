"""The end of an attempt: evidence, cause, action."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from diffusion_api.outcomes import OF_CAUSE, Action, Cause
from diffusion_api.run import LastWord
from diffusion_api.status import MAX_LAST_LINES, JobStatus, OutputStatus
from diffusion_operator import timestamps
from diffusion_operator.policies.accounting import close_account
from diffusion_operator.policies.attempt_starts import is_starting, open_next
from diffusion_operator.policies.choices import retuned, without_earlier_waits
from diffusion_operator.policies.evidence import Ending, ending_of, is_unknown
from diffusion_operator.policies.faulty_nodes import exclude
from diffusion_operator.policies.leftovers import leftovers
from diffusion_operator.policies.run_policy import Verdict, describe_wait, jittered, judge
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
    if len(running) == max(len(pods), case.spec.resources.nodes):
        return None  # fewer: one has ended, or went while no operator was there to see it
    if running:
        # One ended rank ends the attempt for all: the others wait for it in vain. Where nothing is left to be done they
        # are about to end by themselves.
        ended = [pod for pod in pods if pod not in running]
        done = bool(ended) and all(pod.completed for pod in ended)
        stopping = () if done else tuple(pod for pod in running if not pod.deleting)
        status = None
        if stopping and is_starting(case):  # no longer: pods that go now are not to be created again
            status = _say(case.status, case, "PodsReady", "Stopping", f"a pod of attempt {attempt.number} has ended")
        again = seconds_to_stuck(running, case)
        return Decision(rule="attemptEnded", status=status, delete=stopping, again_seconds=again)
    return follow(case, *close(case), rule="attemptEnded")


def follow(case: Case, status: JobStatus, verdict: Verdict, *, rule: str) -> Decision:
    """Return what follows from a closed attempt."""
    if verdict.action == Action.RESUME:
        return open_next(case, status, rule=rule)
    status = back_off(case, status, verdict) if verdict.action == Action.BACK_OFF else finish(case, status, verdict)
    return Decision(rule=rule, status=status, delete=leftovers(case), again_seconds=verdict.wait_seconds)


def seconds_to_stuck(pods: tuple[SeenPod, ...], case: Case) -> float | None:
    """Return when to look again at pods that are being deleted, in case their node never answers."""
    ends = [pod.raw["metadata"]["deletionTimestamp"] for pod in pods if pod.deleting]
    left = [(timestamps.from_text(end) - case.now).total_seconds() for end in ends]
    return max(1.0, max(left) + 31) if left else None


def close(case: Case, *, stopped_for: Ending | None = None) -> tuple[JobStatus, Verdict]:
    """Return the status with the attempt closed, and what follows from its end.

    `stopped_for` is why the operator stopped it, if it did; what is final about its own end goes before.
    """
    attempt = case.status.attempts[0]
    pods = case.pods_of(attempt.number)
    condition = case.job.condition("Suspended")
    stopped = case.spec.suspend or (condition is not None and condition.reason == SUSPENDING)
    ending = ending_of(pods, stopped=stopped, now=case.now)
    if stopped_for is not None and OF_CAUSE[ending.cause].action not in {Action.SUCCEED, Action.FAIL}:
        ending = replace(ending, cause=stopped_for.cause, message=stopped_for.message)
    status = accepted(case)
    # Of steps and checkpoints rank 0 knows most, so it has the last word.
    for report in (case.seen.heard.report, *(pod.last_word for pod in reversed(pods))):
        if report is not None:
            status = take_report(status, report)
    verdict = judge(status, case.spec, ending)
    verdict = replace(verdict, wait_seconds=jittered(verdict.wait_seconds, key=f"{case.job.uid}/{attempt.number}"))
    status = close_account(case, status, completed=verdict.action == Action.SUCCEED)
    status = edit_attempt(
        status,
        ended_at=timestamps.to_text(case.now),
        cause=str(verdict.cause),
        exit_code=ending.exit_code,
        message=short(verdict.message),
        last_lines=(ending.word.last_lines if ending.word else _left_behind(pods))[-MAX_LAST_LINES:],
        log=next((pod.last_word.log for pod in pods if pod.last_word and pod.last_word.log), None),
        nodes=nodes_of(pods) or attempt.nodes,
    )
    status = exclude(case, count(status, **verdict.counted), verdict.cause)
    if verdict.micro_batch_size is not None:
        status = retuned(status, verdict.micro_batch_size)
    if verdict.cause == Cause.NO_CAPACITY:
        status = without_earlier_waits(status)
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
    reason = "StoppedEarly" if word and word.stopped_early_at is not None else "Completed"
    status = status.model_copy(
        update={"phase": "Complete", "message": message, "output": output, "next_attempt_at": None}
    )
    status = _say(status, case, "Progressing", "Complete", message)
    return set_condition(
        status, "Complete", "True", reason=reason, message=message, generation=case.job.generation, now=case.now
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


def _left_behind(pods: tuple[SeenPod, ...]) -> str:
    """Return the end of the log of a container that ended without a last word, as the kubelet keeps it."""
    silent = (pod for pod in pods if pod.terminated.get("exitCode") and pod.last_word is None and not is_unknown(pod))
    return next((str(pod.terminated["message"]) for pod in silent if pod.terminated.get("message")), "")


def _word(case: Case) -> LastWord | None:
    pods = case.pods_of(case.status.attempt)
    return next((pod.last_word for pod in pods if pod.last_word is not None), None)


def _say(status: JobStatus, case: Case, kind: str, reason: str, message: str) -> JobStatus:
    return set_condition(
        status, kind, "False", reason=reason, message=message, generation=case.job.generation, now=case.now
    )
