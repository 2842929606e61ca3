"""Pods that hold GPUs and cannot start: they are given up after a while, and not sooner."""

from typing import Any

import pytest

from diffusion_operator.policies.vain_start import IN_VAIN, VAIN_SECONDS
from diffusion_operator.state import Decision
from testkit.builders import Object, at, container, deleting, make_pod
from testkit.deciding import after, ask, condition, started

LONG_AGO = -VAIN_SECONDS


def waiting(cause: str, *, since: float = LONG_AGO, node: str = "n1", **pod: Any) -> tuple[Object, Object]:
    """Return a job that has waited for this since then, and its pod."""
    job = started()
    pending = {"cause": cause, "detail": "as the kubelet says", "hint": "mend it", "since": at(since)}
    job["status"] |= {"pending": pending}
    return job, make_pod(job, node=node, **pod)


def look(cause: str, **more: Any) -> Decision:
    job, pod = waiting(cause, **more)
    return ask(job, pod)


@pytest.mark.parametrize("waits", sorted(IN_VAIN))
def test_it_gives_the_gpus_back_and_backs_off(waits: str) -> None:
    job, pod = waiting(waits)
    decision = ask(job, pod)
    cause = str(IN_VAIN[waits])
    assert [found.name for found in decision.delete] == ["cats-1-0"]
    assert condition(decision, "Progressing") == ("False", cause)
    job = after(job, decision)
    over = ask(job, make_pod(job, node="n1", metadata=deleting(), status={"phase": "Failed"}))
    assert over.status is not None
    assert over.status.attempts[0].cause == cause
    assert over.status.attempts[0].message.endswith("tried for 15m (as the kubelet says): mend it")
    assert (over.status.counters.infrastructure, over.status.counters.failures) == (1, 0)
    assert over.status.next_attempt_at is not None


@pytest.mark.parametrize(
    "case",
    [
        {"since": LONG_AGO + 1},
        {"node": ""},
        {"phase": "Running"},
        {"metadata": deleting()},
    ],
    ids=["not for long", "holds nothing", "has started", "goes already"],
)
def test_when_it_is_not_in_vain(case: dict[str, Any]) -> None:
    assert look("ImagePullFailed", **case).rule != "vainStart"


def test_a_node_without_a_network_for_pods_is_avoided() -> None:
    job, pod = waiting("SandboxFailed")
    decision = ask(job, pod)
    assert decision.status is not None
    assert [(entry.node, entry.reason) for entry in decision.status.excluded_nodes] == [("n1", "AdmissionRejected")]
    assert [(d.status.excluded_nodes) for d in [look("MountFailed")] if d.status] == [()]


def test_two_looks_in_a_row_are_not_a_quarter_of_an_hour() -> None:
    """Progressing names what is waited for by the same word as what a stopped attempt ended for."""
    job = started()
    refused = container(waiting={"reason": "ErrImagePull", "message": "429 Too Many Requests"})
    pod = make_pod(job, node="n1", status=refused)
    first = ask(job, pod)
    assert condition(first, "Progressing") == ("False", "ImagePullFailed")
    second = ask(after(job, first), pod, seconds=10)
    assert (second.rule, second.delete) == ("attemptRuns", ())
    runs = ask(after(job, first), make_pod(job, node="n1", phase="Running"), seconds=10)
    assert (runs.rule, runs.delete) == ("attemptRuns", ())
    late = ask(after(job, first), pod, seconds=VAIN_SECONDS)
    assert late.rule == "vainStart"
    ends = make_pod(job, node="n1", status={**refused, "phase": "Failed"}, metadata=deleting())
    over = ask(after(job, late), ends, seconds=VAIN_SECONDS + 1)
    assert over.status is not None
    assert over.status.attempts[0].cause == "ImagePullFailed"


def test_other_waits_are_waited_for() -> None:
    assert look("ImagePull", status=container(waiting={"reason": "ContainerCreating"})).rule != "vainStart"
