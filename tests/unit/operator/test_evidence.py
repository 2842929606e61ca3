"""From what is left of a pod to a cause: each kind of evidence alone, and who outranks whom."""

from typing import Any

import pytest

from diffusion_api.outcomes import Cause
from diffusion_operator.policies.evidence import ending_of
from diffusion_operator.state import SeenPod
from testkit.builders import (
    NOW,
    at,
    container,
    deleting,
    disrupted,
    last_word,
    make_job,
    make_pod,
    merge,
    terminated,
)

JOB = make_job()


def pod(*, gone: bool = False, metadata: dict[str, Any] | None = None, phase: str = "Failed", **status: Any) -> SeenPod:
    return SeenPod(make_pod(JOB, node="n1", phase=phase, metadata=metadata, status=status), gone=gone)


def cause(*pods: SeenPod, stopped: bool = False) -> Cause:
    return ending_of(pods, stopped=stopped, now=NOW).cause


EXITS = [
    (0, Cause.COMPLETED),
    (64, Cause.BAD_CONFIG),
    (65, Cause.BAD_DATA),
    (66, Cause.INPUT_MISSING),
    (69, Cause.STORAGE_UNAVAILABLE),
    (70, Cause.DIVERGED),
    (75, Cause.PREEMPTED),
    (77, Cause.PERMISSION_DENIED),
    (80, Cause.CUDA_OUT_OF_MEMORY),
    (81, Cause.COLLECTIVE_TIMEOUT),
    (82, Cause.GPU_FAULT),
    (83, Cause.HANG),
    (84, Cause.FENCED),
    (1, Cause.CRASH),
    (137, Cause.CRASH),
    (139, Cause.CRASH),
    (143, Cause.PREEMPTED),
]


@pytest.mark.parametrize(("code", "expected"), EXITS)
def test_a_raw_exit_code_alone(code: int, expected: Cause) -> None:
    assert cause(pod(**terminated(code))) == expected


@pytest.mark.parametrize(("code", "expected"), EXITS)
def test_the_last_word_outranks_the_raw_code(code: int, expected: Cause) -> None:
    said = pod(**terminated(137, message=last_word(code)))
    if code in {137, 143}:  # no codes that a trainer gives itself
        return
    assert cause(said) == expected
    assert ending_of((said,), stopped=False, now=NOW).message == "as the trainer says"


@pytest.mark.parametrize("text", ["", "Killed", '{"version":1}', last_word(64, attempt=7)])
def test_a_message_that_is_not_this_attempts_last_word_is_no_evidence(text: str) -> None:
    assert cause(pod(**terminated(1, message=text))) == Cause.CRASH


POD_DISK = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi."
VOLUME_DISK = 'Usage of EmptyDir volume "work" exceeds the limit "1Gi".'
CONTAINER_DISK = "Container trainer exceeded its local ephemeral storage limit"
SHUTDOWN = "Pod was terminated in response to imminent node shutdown."


def reason(word: str, message: str = "") -> dict[str, Any]:
    return {"reason": word, "message": message}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (reason("Evicted", POD_DISK), Cause.EPHEMERAL_STORAGE),
        (reason("Evicted", VOLUME_DISK), Cause.EPHEMERAL_STORAGE),
        (reason("Evicted", CONTAINER_DISK), Cause.EPHEMERAL_STORAGE),
        (reason("Evicted", "The node was low on resource: memory."), Cause.PREEMPTED),
        (reason("Preempting", "Preempted in order to admit critical pod"), Cause.PREEMPTED),
        (reason("Terminated", SHUTDOWN), Cause.PREEMPTED),
        (reason("NodeShutdown"), Cause.PREEMPTED),
        (reason("NodeLost"), Cause.NODE_LOST),
        (reason("UnexpectedAdmissionError", "Allocate failed"), Cause.ADMISSION_REJECTED),
        (reason("OutOfnvidia.com/gpu"), Cause.ADMISSION_REJECTED),
        (disrupted("TerminationByKubelet"), Cause.PREEMPTED),
    ],
)
def test_the_pods_own_reason(status: dict[str, Any], expected: Cause) -> None:
    assert cause(pod(**status)) == expected


def test_the_disk_limit_outranks_the_kubelets_disruption_condition() -> None:
    assert cause(pod(**reason("Evicted", POD_DISK), **disrupted("TerminationByKubelet"))) == Cause.EPHEMERAL_STORAGE


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("PreemptionByScheduler", Cause.PREEMPTED),
        ("EvictionByEvictionAPI", Cause.PREEMPTED),
        ("DeletionByTaintManager", Cause.PREEMPTED),
        ("DeletionByPodGC", Cause.NODE_LOST),
        ("SomethingNew", Cause.PREEMPTED),
    ],
)
def test_a_disruption_outranks_what_the_trainer_says(reason: str, expected: Cause) -> None:
    status = disrupted(reason) | terminated(70, message=last_word(70))
    assert cause(pod(metadata=deleting(), **status)) == expected


def test_a_taint_ends_pods_of_living_nodes_and_of_dead_ones() -> None:
    """The condition is the same for both: that the container's end was reported tells them apart."""
    lost = pod(phase="Running", metadata=deleting(), gone=True, **disrupted("DeletionByTaintManager"))
    assert cause(lost) == Cause.NODE_LOST
    said = pod(metadata=deleting(), **disrupted("DeletionByTaintManager"), **terminated(75, message=last_word(75)))
    assert cause(said) == Cause.PREEMPTED


@pytest.mark.parametrize(("announced", "expected"), [(-30, Cause.PREEMPTED), (60, Cause.CRASH)])
def test_a_disruption_counts_also_when_only_the_removal_was_seen(announced: float, expected: Cause) -> None:
    """The kubelet's own deletion, without grace, comes after the container's end."""
    condition = disrupted("PreemptionByScheduler")
    condition["conditions"][0]["lastTransitionTime"] = at(announced)
    removed = pod(gone=True, metadata=deleting(asked=20, grace=0), **condition, **terminated(137))
    assert cause(removed) == expected


def test_an_announced_disruption_that_did_not_come_about_is_no_evidence() -> None:
    assert cause(pod(**disrupted("PreemptionByScheduler"), **terminated(64, message=last_word(64)))) == Cause.BAD_CONFIG


@pytest.mark.parametrize("gone", [False, True])
def test_a_pod_that_was_collected_with_its_node(gone: bool) -> None:
    """The collector writes phase and condition first and deletes without grace, so there is no deletionTimestamp."""
    collected = pod(
        gone=gone, **disrupted("DeletionByPodGC"), **container(running={"startedAt": "2026-01-02T00:00:00Z"})
    )
    assert cause(collected) == Cause.NODE_LOST


@pytest.mark.parametrize(("reported", "code"), [("ContainerStatusUnknown", 137), ("Unknown", 255)])
def test_an_exit_code_that_the_kubelet_made_up_is_no_crash(reported: str, code: int) -> None:
    assert cause(pod(**terminated(code, reason=reported))) == Cause.NODE_LOST
    rejected = reason("UnexpectedAdmissionError", "Allocate failed") | terminated(code, reason=reported)
    assert cause(pod(**rejected)) == Cause.ADMISSION_REJECTED


def test_host_memory() -> None:
    assert cause(pod(**terminated(137, reason="OOMKilled"))) == Cause.HOST_OUT_OF_MEMORY
    assert cause(pod(metadata=deleting(), **terminated(137, reason="OOMKilled"))) == Cause.PREEMPTED


def test_who_finished_before_its_deletion_was_asked_for_ended_by_itself() -> None:
    ended = merge(deleting(asked=-5, grace=0), {})
    assert cause(pod(metadata=ended, gone=True, **terminated(64, finished=-60))) == Cause.BAD_CONFIG
    assert cause(pod(metadata=ended, gone=True, **terminated(64, finished=-5))) == Cause.PREEMPTED


def test_a_pod_that_vanished_was_preempted() -> None:
    assert cause() == Cause.PREEMPTED
    assert cause(pod(phase="Running", gone=True)) == Cause.PREEMPTED


def test_a_pod_that_outlives_its_grace_is_on_a_lost_node() -> None:
    stuck = pod(phase="Running", metadata=deleting(asked=-151, grace=120))
    assert stuck.stuck(NOW)
    assert cause(stuck) == Cause.NODE_LOST


def test_success_outranks_a_disruption_that_came_too_late() -> None:
    late = disrupted("PreemptionByScheduler") | terminated(0, message=last_word(0))
    assert cause(pod(phase="Succeeded", metadata=deleting(), **late)) == Cause.COMPLETED


def test_fenced_outranks_everything() -> None:
    fenced = disrupted("PreemptionByScheduler") | terminated(84, message=last_word(84))
    assert cause(pod(metadata=deleting(), **fenced), stopped=True) == Cause.FENCED


class TestSuspension:
    def test_what_was_stopped_by_it_is_suspended(self) -> None:
        assert cause(stopped=True) == Cause.SUSPENDED
        assert cause(pod(metadata=deleting(), **terminated(75, message=last_word(75))), stopped=True) == Cause.SUSPENDED
        assert cause(pod(metadata=deleting(), **terminated(137)), stopped=True) == Cause.SUSPENDED

    def test_what_yields_was_told_to(self) -> None:
        """Though the last that is seen of it is its removal, which is after its end."""
        removed = deleting(asked=5, grace=0)
        word = terminated(75, message=last_word(75))
        assert cause(pod(metadata=removed, gone=True, **word), stopped=True) == Cause.SUSPENDED

    def test_what_ended_by_itself_keeps_its_cause(self) -> None:
        assert cause(pod(**terminated(64)), stopped=True) == Cause.BAD_CONFIG
        assert cause(pod(phase="Succeeded", metadata=deleting(), **terminated(0)), stopped=True) == Cause.COMPLETED


class TestSeveralRanks:
    def test_all_must_complete(self) -> None:
        done, failed = pod(phase="Succeeded", **terminated(0)), pod(**terminated(1))
        assert cause(done, done) == Cause.COMPLETED
        assert cause(done, failed) == Cause.CRASH

    def test_the_disrupted_one_speaks_for_those_that_lost_it(self) -> None:
        lost = pod(**terminated(81, message=last_word(81)))
        preempted = pod(metadata=deleting(), **terminated(137))
        assert cause(lost, preempted) == Cause.PREEMPTED


def test_the_message_names_what_was_seen_and_what_to_do() -> None:
    message = ending_of((pod(**terminated(137, reason="OOMKilled")),), stopped=False, now=NOW).message
    assert "more memory than it may" in message
    assert "use a profile with more memory" in message
