"""An attempt in progress: its pods are created, wait, or run."""

from __future__ import annotations

from datetime import timedelta

from diffusion_api import names
from diffusion_api.status import JobStatus
from diffusion_operator.policies import attempt_starts, failover, queueing
from diffusion_operator.policies.attempt_ended import nodes_of, seconds_to_stuck
from diffusion_operator.policies.leftovers import leftovers
from diffusion_operator.policies.pending import why_waiting
from diffusion_operator.policies.validation import accepted
from diffusion_operator.state import Case, Decision, Heard, SeenPod
from diffusion_operator.status import (
    Value,
    calm,
    duration,
    edit_attempt,
    sentence,
    set_condition,
    set_pending,
    short,
    take_report,
)

LOOK_AGAIN_SECONDS = 10
"""A mount that fails changes nothing on the pod: only asking for its events tells."""
LOOK_AROUND_SECONDS = 60
"""What an autoscaler says, and who holds GPUs, changes nothing on a pod that finds no node."""
SILENCE = timedelta(seconds=120)
"""After so long without an answer the status says that progress cannot be read."""


def attempt_runs(case: Case) -> Decision | None:
    """Create what is missing of a starting attempt; otherwise say how far it is."""
    attempt = case.job.open_attempt
    if attempt is None:
        return None
    pods = case.pods_of(attempt.number)
    if attempt_starts.is_starting(case):
        present = {pod.name for pod in pods}
        wanted = attempt_starts.pods(case, case.status)
        missing = tuple(manifest for manifest in wanted if manifest["metadata"]["name"] not in present)
        if missing:
            return Decision(rule="attemptRuns", status=_refused(case), create=attempt_starts.services(case) + missing)
    status = accepted(case)
    status = queueing.admission(case, edit_attempt(status, nodes=nodes_of(pods) or attempt.nodes), pods)
    stopping = tuple(pod for pod in pods if pod.deleting)
    if stopping:
        return _stops(case, status, stopping)
    waiting = tuple(pod for pod in pods if pod.phase != "Running")
    if waiting:
        return _waits(case, status, waiting)
    return _progresses(case, status, pods[0])


def _refused(case: Case) -> JobStatus | None:
    """Return the status that says why the API server will not have the pods; None where it has not refused any."""
    refusal = case.seen.refusal
    if refusal is None:
        return None
    status = set_pending(
        case.status, cause=refusal.cause, detail=refusal.detail, hint=refusal.hint, now=case.now
    ).model_copy(update={"phase": "Pending", "message": short(f"{refusal.cause}: {refusal.detail}")})
    return _say(case, status, "Progressing", "False", refusal.cause, refusal.detail)


def _stops(case: Case, status: JobStatus, stopping: tuple[SeenPod, ...]) -> Decision:
    message = f"pod {stopping[0].name} was told to stop and saves a checkpoint"
    status = status.model_copy(update={"phase": "Interrupted", "message": message})
    status = _say(case, status, "PodsReady", "False", "Stopping", message)
    status = _say(case, status, "Progressing", "False", "Stopping", message)
    return Decision(
        rule="attemptRuns", status=status, delete=leftovers(case), again_seconds=seconds_to_stuck(stopping, case)
    )


def _waits(case: Case, status: JobStatus, waiting: tuple[SeenPod, ...]) -> Decision:
    pod = waiting[0]
    phase, message = ("Preparing", f"pod {pod.name} starts on {pod.node}") if pod.node else ("Scheduling", "")
    if pod.gated:
        phase, message = (
            "Queued",
            f"pod {pod.name} waits in queue {pod.raw['metadata']['labels'].get(names.LABEL_QUEUE)}",
        )
    message = message or f"pod {pod.name} waits for a node"
    why = why_waiting(case, case.pods_of(pod.attempt))
    reason = "Waiting"
    if why is not None:
        # `accepted` has cleared it; the old one is needed for `since`.
        status = status.model_copy(update={"pending": case.status.pending})
        status = set_pending(status, cause=why.cause, detail=why.detail, hint=why.hint, now=case.now)
        reason, message = why.cause, f"{why.cause}: {why.detail}"
    status = status.model_copy(update={"phase": phase, "message": short(message)})
    status = _say(case, status, "PodsReady", "False", "Waiting", message)
    status = _say(case, status, "Progressing", "False", reason, message)
    return Decision(
        rule="attemptRuns",
        status=status,
        delete=leftovers(case),
        again_seconds=_again_seconds(case, waiting),
    )


def _again_seconds(case: Case, waiting: tuple[SeenPod, ...]) -> float | None:
    if any(pod.waits_on_its_node for pod in waiting):
        return LOOK_AGAIN_SECONDS
    # A gated pod changes when its gates do; of one that no scheduler looks at there is no news to wait for.
    gated = all(pod.raw["spec"].get("schedulingGates") for pod in waiting)
    queued = queueing.look_again_seconds(case) if any(pod.gated for pod in waiting) else None
    left = (queued, None if gated else LOOK_AROUND_SECONDS, failover.seconds_left(case))
    return min((seconds for seconds in left if seconds is not None), default=None)


def _progresses(case: Case, status: JobStatus, pod: SeenPod) -> Decision:
    heard = case.seen.heard
    status = _say(case, status, "PodsReady", "True", "Running", "all pods run")
    if heard.report is not None:
        status = take_report(status, heard.report)
    phase, message = _stage(heard, status)
    value: Value = "True"
    reason, said = phase, "the trainer reports progress"
    if heard.silent_since is not None and case.now - heard.silent_since >= SILENCE:
        # Told, and acted upon much later only (`stall`): the trainer watches itself, and what it writes does not pass
        # through here.
        value, reason, said = "Unknown", "ProgressUnreachable", f"progress cannot be read: {heard.error}"
        message = f"{message}; {said}"
    elif standing := _stands_still(case, heard):
        value, reason, said = "Unknown", "ProgressStale", standing
        message = f"{message}; {said}"
    status = status.model_copy(update={"phase": phase, "message": short(message)})
    status = _say(case, status, "Progressing", value, reason, said)
    status = calm(status, case.status, least_seconds=case.status_seconds)
    return Decision(rule="attemptRuns", status=status, delete=leftovers(case), poll=pod)


def _stands_still(case: Case, heard: Heard) -> str:
    """Return what is said of a training that has shown no sign of life for a third of what it may; else nothing."""
    idle, limit = heard.report.idle_seconds if heard.report else None, case.spec.run_policy.stall_seconds
    if idle is None or idle < limit / 3:
        return ""
    # No number that grows: each would be another write.
    return (
        f"no sign of life for {duration(limit / 3)} or more; after {duration(limit)} (stallSeconds) it counts as hung"
    )


def _stage(heard: Heard, status: JobStatus) -> tuple[str, str]:
    report = heard.report
    if report is None and status.progress is not None and status.attempts[0].reached_step is not None:
        return "Running", sentence(status.progress)  # heard of before the operator was restarted
    if report is None or report.stage == "Preparing":
        detail = report.detail if report is not None else ""
        return "Preparing", detail or "the trainer prepares data and model"
    if report.stage == "Exporting":
        return "Running", report.detail or "the trainer exports the weights"
    return "Running", sentence(status.progress) if status.progress else report.detail or "the trainer runs"


def _say(case: Case, status: JobStatus, kind: str, value: Value, reason: str, message: str) -> JobStatus:
    return set_condition(
        status, kind, value, reason=reason, message=message, generation=case.job.generation, now=case.now
    )
