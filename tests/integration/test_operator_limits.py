"""Deadlines and deletion by time on a real API server, with the operator away at the worst moments.

No operator stands here all the time: each test starts its own.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from testkit.builders import last_word, make_checkpoint, make_job
from testkit.kube import condition
from testkit.operating import JOBS, Installation, Kubelet, OperatorProcess, User, installed
from testkit.process import ServerProcess
from testkit.waiting import wait_until

pytestmark = pytest.mark.apiserver


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("limits")) as found:
        yield found


@pytest.fixture
def place(installation: Installation, request: pytest.FixtureRequest) -> Iterator[tuple[User, Kubelet]]:
    with installation.kube.namespace(request.node.originalname) as name:
        yield User(installation.kube, name), Kubelet(installation.kube, name)


Place = tuple[User, Kubelet]


def is_gone(installation: Installation, user: User) -> bool:
    return installation.kube.find(JOBS, "cats", namespace=user.namespace) is None


def created(installation: Installation, user: User) -> list[str]:
    """Return the names of the pods that the operator has created, by the API server's own log."""
    log = installation.audit(user.namespace, verbs=("create",))
    done = [e["objectRef"] for e in log if e["responseStatus"]["code"] < 300]
    return [found["name"] for found in done if found["resource"] == "pods"]


def set_back(installation: Installation, user: User, **status: Any) -> None:
    """Let time have passed: change instants in the status, as nobody but a test may. No test waits for a deadline."""
    installation.kube.api.patch(JOBS, "cats", {"status": status}, namespace=user.namespace, subresource="status")


LONG_AGO = "2026-01-02T03:04:05Z"


def test_a_deadline_that_passes_while_the_operator_is_away(place: Place, installation: Installation) -> None:
    """It is told to stop by one operator, ends without any, and is judged by a third."""
    user, kubelet = place
    policy = {"activeDeadlineSeconds": 1000, "backoffLimit": 0}
    with OperatorProcess(installation, namespace=user.namespace):
        user.create(make_job(runPolicy=policy))
        kubelet.run("cats-1-0")
        assert "startTime" in user.wait_phase("Preparing")
    set_back(installation, user, startTime=LONG_AGO)
    with OperatorProcess(installation, namespace=user.namespace):
        told = installation.kube.wait_for(
            "pods", "cats-1-0", lambda pod: "deletionTimestamp" in pod["metadata"], namespace=user.namespace
        )
        assert told["metadata"]["deletionGracePeriodSeconds"] == 120, "the trainer has its whole grace to save"
        assert user.wait_phase("Interrupted")["attempts"][0].get("endedAt") is None
    kubelet.end("cats-1-0", 75, message=last_word(75, step=300, latest_checkpoint=make_checkpoint(300)))
    kubelet.remove("cats-1-0")
    with OperatorProcess(installation, namespace=user.namespace):
        status = user.wait_phase("Failed")
    assert condition(user.job(), "Failed")["reason"] == "DeadlineExceeded"
    assert [(item["number"], item["cause"]) for item in status["attempts"]] == [(1, "DeadlineExceeded")]
    assert (status["counters"]["failures"], status["counters"]["preemptions"]) == (0, 0)
    assert created(installation, user) == ["cats-1-0"]


def test_a_pod_that_finds_no_node_in_time(place: Place, installation: Installation) -> None:
    user, kubelet = place
    with OperatorProcess(installation, namespace=user.namespace):
        user.create(make_job(runPolicy={"pendingDeadlineSeconds": 1000}))
        kubelet.wait_for_pod("cats-1-0")
        said = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
        unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
        kubelet.patch("cats-1-0", conditions=[unschedulable])
        said_so = lambda job: job.get("status", {}).get("pending", {}).get("cause") == "NoSuchNode"  # noqa: E731
        installation.kube.wait_for(JOBS, "cats", said_so, namespace=user.namespace)
        set_back(installation, user, placement={"waitsSince": LONG_AGO})
        status = user.wait_phase("Failed")
        assert condition(user.job(), "Failed")["reason"] == "PendingDeadlineExceeded"
        assert "NoSuchNode: none of 0 nodes has nvidia.com/gpu; add nodes" in status["message"]
        wait_until(
            lambda: installation.kube.items("pods", namespace=user.namespace) == [], describe="no pod to be left"
        )
    assert created(installation, user) == ["cats-1-0"]


def test_deletion_by_time_across_a_restart(place: Place, installation: Installation) -> None:
    """Nothing is made anew after the pod of a finished job is gone, and the time runs on while nobody watches."""
    user, kubelet = place
    with OperatorProcess(installation, namespace=user.namespace):
        user.create(make_job(runPolicy={"ttlSecondsAfterFinished": 1000}))
        kubelet.run("cats-1-0")
        kubelet.end("cats-1-0", 0, message=last_word(0))
        ended = user.wait_phase("Complete")["conditions"]
    kubelet.remove("cats-1-0")
    set_back(installation, user, conditions=[entry | {"lastTransitionTime": LONG_AGO} for entry in ended])
    with OperatorProcess(installation, namespace=user.namespace):
        wait_until(lambda: is_gone(installation, user), describe="the job to go")
    assert created(installation, user) == ["cats-1-0"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_the_deletion(place: Place, installation: Installation, when: str) -> None:
    user, kubelet = place
    with OperatorProcess(installation, namespace=user.namespace):
        user.create(make_job(runPolicy={"ttlSecondsAfterFinished": 1000}))
        kubelet.run("cats-1-0")
        kubelet.end("cats-1-0", 0, message=last_word(0))
        user.wait_phase("Complete")
        wait_until(lambda: "Complete" in user.reasons(), describe="the last event")
        ended = user.job()["status"]["conditions"]
    set_back(installation, user, conditions=[entry | {"lastTransitionTime": LONG_AGO} for entry in ended])
    crashing = OperatorProcess(installation, namespace=user.namespace, failpoint=f"delete:1:{when}")
    assert crashing.wait() == 137
    assert is_gone(installation, user) == (when == "after")
    with OperatorProcess(installation, namespace=user.namespace):
        wait_until(lambda: is_gone(installation, user), describe="the job to go")


def test_kopf_run_works_too(place: Place, installation: Installation) -> None:
    """Under kopf's own command line, and in one namespace."""
    user, kubelet = place
    environment = {
        **os.environ,
        "KUBECONFIG": str(installation.kubeconfig),
        "DIFFUSION_OPERATOR_HTTP_PORT": "0",
        "DIFFUSION_OPERATOR_PREFLIGHT": "OFF",
        "DIFFUSION_OPERATOR_NAMESPACES": user.namespace,
    }
    command = [sys.executable, "-m", "kopf", "run", "-m", "diffusion_operator", "--namespace", user.namespace]
    log = installation.folder / "kopf.log"
    process = ServerProcess(command, log=log, env=environment)
    try:
        wait_until(lambda: "started: 0 jobs" in log.read_text(), describe="kopf run", timeout=120, detail=process.tail)
        user.create(make_job())
        kubelet.run("cats-1-0")
        user.wait_phase("Preparing")
    finally:
        process.stop()
    assert created(installation, user) == ["cats-1-0"]
