"""From what is left of pods to the cause of their end. The order of `CLUES` is the precedence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from diffusion_api.outcomes import OF_CAUSE, OF_CODE, Cause, ExitCode
from diffusion_api.run import LastWord
from diffusion_operator import timestamps
from diffusion_operator.state import SeenPod

SIGTERM_CODE = 143
SIGKILL_CODE = 137
BY_TAINT = "DeletionByTaintManager"
NODE_GONE = {BY_TAINT, "DeletionByPodGC", "WorkloadEvictedDueToNodeFailures"}
BY_KUBELET = "TerminationByKubelet"
NODE_SHUTDOWN = {"Terminated", "NodeShutdown", "Shutdown", "Preempting", "Evicted"}
UNKNOWN_END = {"ContainerStatusUnknown", "Unknown"}
"""What kubelets say of containers that are gone without them knowing how."""
MAX_DETAIL = 700
CLOCK_SKEW = timedelta(seconds=5)
"""How much the clocks of two machines may differ."""
_CONSEQUENCES: dict[int, int] = {ExitCode.COLLECTIVE_TIMEOUT: 1, ExitCode.YIELDED: 2, SIGTERM_CODE: 2}
"""Codes that mostly follow from another rank's end, the more so the higher."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended."""

    cause: Cause
    message: str
    exit_code: int | None = None
    word: LastWord | None = None


Clue = Callable[[SeenPod, datetime], tuple[Cause, str] | None]


def ending_of(pods: tuple[SeenPod, ...], *, stopped: bool, now: datetime) -> Ending:
    """Return how an attempt ended whose pods have all ended. `stopped`: the user suspended the job meanwhile.

    Of several ranks the one speaks that explains the others: pods that were stopped because another one had ended say
    nothing; of the rest, who outranks the others by the precedence, then who says more than that it lost them, then who
    ended first. Completed they must be all.
    """
    if not pods:
        cause = Cause.SUSPENDED if stopped else Cause.PREEMPTED
        return Ending(cause=cause, message=_sentence(cause, "the pod is gone without a trace"))
    speaking = pods if stopped else tuple(pod for pod in pods if not _stopped_with_others(pod, pods, now)) or pods
    endings = [_of_pod(pod, stopped=stopped, now=now) for pod in speaking]
    unfinished = [entry for entry in endings if entry[1].cause != Cause.COMPLETED]
    return min(unfinished or endings, key=lambda entry: entry[0])[1]


def _stopped_with_others(pod: SeenPod, pods: tuple[SeenPod, ...], now: datetime) -> bool:
    """Return whether the pod was deleted because another one had ended: then that one says why.

    What another one says of itself counts even when its node's clock is a little ahead; that it lost its peers, or was
    told to stop, counts only when it was clearly there before the deletion.
    """
    if pod.finished and not _was_deleted(pod):
        return False
    if not pod.deleting or pod.stuck(now) or pod.lost(now) or pod.disruption:
        return False
    asked_at = _deletion_asked_at(pod.raw["metadata"])
    for other in pods:
        if other is pod or not other.terminated or other.completed or _was_deleted(other):
            continue
        finished_at, explains = other.terminated.get("finishedAt"), other.said_code not in _CONSEQUENCES
        if finished_at is None:
            if explains:
                return True
        elif timestamps.from_text(finished_at) <= asked_at + (CLOCK_SKEW if explains else timedelta(0)):
            return True
    return False


def _of_pod(pod: SeenPod, *, stopped: bool, now: datetime) -> tuple[tuple[int, int, str], Ending]:
    """Return what sorts the ending among those of other ranks, and the ending."""
    word = pod.last_word
    code = pod.terminated.get("exitCode")
    for rank, clue in enumerate(CLUES):
        found = clue(pod, now)
        if found is None:
            continue
        cause, detail = found
        told = _was_deleted(pod) or (clue is _said_or_exited and cause == Cause.PREEMPTED)
        if stopped and told and clue not in (_fenced, _completed):
            cause, detail = Cause.SUSPENDED, ""
        order = (
            rank,
            _CONSEQUENCES.get(pod.said_code, 0),
            "" if pod.completed else pod.terminated.get("finishedAt", ""),
        )
        # What the cluster says of its doing outranks the trainer, which knows only that it was told to stop.
        own = word if clue in _OF_THE_TRAINER or not detail else None
        return order, Ending(cause=cause, message=_message(cause, detail, own), exit_code=code, word=word)
    raise AssertionError("the last clue always answers")


def _fenced(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    return (Cause.FENCED, "") if pod.said_code == ExitCode.FENCED else None


def _completed(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    """Before every disruption: the weights are exported, and what came too late did no harm."""
    return (Cause.COMPLETED, "") if pod.completed else None


def _node_stopped_answering(pod: SeenPod, now: datetime) -> tuple[Cause, str] | None:
    """The node, as far as it is known, outranks what the cluster did to the pod because of it."""
    if pod.lost(now) and not pod.finished and not (pod.gone and _was_disrupted_otherwise(pod)):
        return Cause.NODE_LOST, f"node {pod.node} {pod.node_state.lost}{_and_why(pod)}"
    if pod.stuck(now) and not pod.finished:
        return Cause.NODE_LOST, f"node {pod.node} did not stop the pod within its grace"
    return (Cause.NODE_LOST, pod.message) if pod.reason == "NodeLost" else None


def _used_too_much_disk(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    """The pod's own limit; a node that is low on disk evicts pods with other words, and that is a preemption."""
    if pod.reason == "Evicted" and "exceed" in pod.message:
        return Cause.EPHEMERAL_STORAGE, pod.message
    return None


def _disrupted(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    condition = pod.disruption
    if not condition:
        return None
    reason = str(condition.get("reason", ""))
    if reason != BY_KUBELET and pod.terminated and not _was_deleted(pod) and not _ended_after(condition, pod):
        return None  # announced, and the container ended by itself before it came about
    # A container whose end was reported has a kubelet that lives: it was the taint, and not the node's silence.
    tainted = reason == BY_TAINT and bool(pod.terminated)
    cause = Cause.NODE_LOST if reason in NODE_GONE and not tainted else Cause.PREEMPTED
    return cause, f"{reason}: {condition.get('message', '')}{_and_why(pod)}"


def _node_made_room(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    return (Cause.PREEMPTED, f"{pod.reason}: {pod.message}{_and_why(pod)}") if pod.reason in NODE_SHUTDOWN else None


def _deleted(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    return (Cause.PREEMPTED, f"the pod was deleted{_and_why(pod)}") if _was_deleted(pod) else None


def _killed_as_its_node_went(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    """Killed from outside, without a word of the trainer's, on a node that was about to go."""
    if pod.last_word is not None or pod.said_code not in {SIGTERM_CODE, SIGKILL_CODE}:
        return None
    if not pod.node_state.leaving or pod.terminated.get("reason") == "OOMKilled":
        return None
    return Cause.PREEMPTED, f"exit code {pod.said_code}{_and_why(pod)}"


def _out_of_memory(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    return (Cause.HOST_OUT_OF_MEMORY, "") if pod.terminated.get("reason") == "OOMKilled" else None


def _rejected(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    """The node refused the pod: it has failed and its container never was."""
    if pod.terminated and not (pod.reason and is_unknown(pod)):
        return None
    return Cause.ADMISSION_REJECTED, f"{pod.reason}: {pod.message}" if pod.reason else pod.message


def _lost_track(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    """The node was restarted under the container: the exit code is made up."""
    return (Cause.NODE_LOST, str(pod.terminated.get("message", ""))) if is_unknown(pod) else None


def _said_or_exited(pod: SeenPod, _now: datetime) -> tuple[Cause, str] | None:
    code = pod.said_code
    said = str(pod.terminated.get("message") or "")
    if code in OF_CODE:
        return OF_CODE[code].cause, said
    if code == SIGTERM_CODE:
        return Cause.PREEMPTED, "the trainer was terminated before it could save"
    return Cause.CRASH, f"exit code {code}{': ' + said if said else ''}"


CLUES: tuple[Clue, ...] = (
    _fenced,
    _completed,
    _node_stopped_answering,
    _used_too_much_disk,
    _disrupted,
    _node_made_room,
    _deleted,
    _rejected,
    _lost_track,
    _out_of_memory,
    _killed_as_its_node_went,
    _said_or_exited,
)


_OF_THE_TRAINER = (_fenced, _completed, _said_or_exited)


def is_unknown(pod: SeenPod) -> bool:
    """Return whether the node lost track of the container, and made its end up."""
    return pod.terminated.get("reason") in UNKNOWN_END


def _and_why(pod: SeenPod) -> str:
    """Return what the node says of its end, to go after what the pod says."""
    leaving = pod.node_state.leaving
    return f"; node {pod.node}: {leaving}" if leaving else ""


def _was_disrupted_otherwise(pod: SeenPod) -> bool:
    """Return whether the cluster ended the pod for another reason than that its node was lost, which came later."""
    return bool(pod.disruption) and pod.disruption.get("reason") not in NODE_GONE


def _ended_after(condition: Mapping[str, object], pod: SeenPod) -> bool:
    """Return whether the container of a deleted pod ended after its disruption was announced, and so because of it."""
    since, finished_at = condition.get("lastTransitionTime"), pod.terminated.get("finishedAt")
    if not pod.deleting or not since or not finished_at:
        return False
    return timestamps.from_text(finished_at) + CLOCK_SKEW >= timestamps.from_text(str(since))


def _was_deleted(pod: SeenPod) -> bool:
    """Return whether the pod was told to end, rather than deleted after it had ended by itself."""
    finished_at = pod.terminated.get("finishedAt")
    if not pod.deleting:
        return pod.gone and not pod.finished
    if not finished_at:
        return True
    return timestamps.from_text(finished_at) >= _deletion_asked_at(pod.raw["metadata"])


def _deletion_asked_at(metadata: Mapping[str, object]) -> datetime:
    # The deletion's timestamp is the end of the grace.
    end = timestamps.from_text(str(metadata["deletionTimestamp"]))
    return end - timedelta(seconds=float(str(metadata.get("deletionGracePeriodSeconds", 0))))


def _message(cause: Cause, detail: str, word: LastWord | None) -> str:
    """Return the trainer's own words where they speak of this end, else the table's."""
    if word is None:
        return _sentence(cause, detail)
    said = OF_CODE[word.exit_code].cause if word.exit_code in OF_CODE else Cause.CRASH
    return word.message if said == cause else _sentence(cause, detail)


def _sentence(cause: Cause, detail: str) -> str:
    """Return what happened and what to do."""
    outcome = OF_CAUSE[cause]
    what = f"{outcome.explanation} ({detail[:MAX_DETAIL]})" if detail else outcome.explanation
    return f"{what}: {outcome.remedy}" if outcome.remedy else what
