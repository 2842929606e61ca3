"""How attempts end, on a real API server: what nodes say, heard by the operator's own watch, with its own rights."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from diffusion_operator.node_state import LOST_AFTER
from testkit.builders import last_word, make_job
from testkit.kube import Kube, Object
from testkit.operating import Installation, Kubelet, OperatorProcess, User, installed

pytestmark = pytest.mark.apiserver


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("endings")) as found, OperatorProcess(found):
        yield found


@pytest.fixture
def place(installation: Installation, request: pytest.FixtureRequest) -> Iterator[tuple[User, Kubelet]]:
    with installation.kube.namespace(request.node.originalname) as name:
        yield User(installation.kube, name), Kubelet(installation.kube, name)


@contextmanager
def a_node(kube: Kube, name: str) -> Iterator[str]:
    """A node of that name that is well; nobody but the test says anything about it."""
    kube.api.create("nodes", {"metadata": {"name": name}})
    try:
        say(kube, name, ready="True")
        yield name
    finally:
        if kube.find("nodes", name):
            kube.api.delete("nodes", name)


def say(kube: Kube, name: str, *taints: Object, ready: str) -> None:
    """Say of a node what its kubelet and the node controller would."""
    condition = {"type": "Ready", "status": ready, "reason": "Test", "message": ""}
    kube.api.patch("nodes", name, {"status": {"conditions": [condition]}}, subresource="status")
    kube.api.patch("nodes", name, {"spec": {"taints": list(taints)}})


def test_a_lost_node_is_not_waited_for(place: tuple[User, Kubelet], installation: Installation) -> None:
    user, kubelet = place
    with a_node(installation.kube, "dies") as node:
        user.create(make_job(runPolicy={"backoffLimit": 0}))
        kubelet.run("cats-1-0", node=node)
        user.wait_phase("Preparing")
        since = "2026-01-02T03:04:05Z"
        taint = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": since}
        say(installation.kube, node, taint, ready="Unknown")
        kubelet.run("cats-2-0", node="elsewhere")
        status = user.wait_phase("Preparing", attempt=2)
        ended = status["attempts"][1]
        assert (ended["cause"], ended["nodes"], status["counters"]["failures"]) == ("NodeLost", [node], 0)
        assert f"node {node} does not answer" in ended["message"]
        found = installation.kube.wait_for(
            "pods", "cats-1-0", lambda pod: "deletionTimestamp" in pod["metadata"], namespace=user.namespace
        )
        assert found["metadata"]["deletionGracePeriodSeconds"] > 0, "never by force: its node may come back"
    assert LOST_AFTER.total_seconds() < 60, "much less than the cluster itself waits"


def test_a_node_that_is_gone_takes_its_pods_along(place: tuple[User, Kubelet], installation: Installation) -> None:
    user, kubelet = place
    with a_node(installation.kube, "vanishes") as node:
        user.create(make_job(runPolicy={"backoffLimit": 0}))
        kubelet.run("cats-1-0", node=node)
        user.wait_phase("Preparing")
        installation.kube.api.delete("nodes", node)
        kubelet.run("cats-2-0", node="elsewhere")
        status = user.wait_phase("Preparing", attempt=2)
        assert (status["attempts"][1]["cause"], status["counters"]["failures"]) == ("NodeLost", 0)


def test_a_spot_notice_is_acted_upon(place: tuple[User, Kubelet], installation: Installation) -> None:
    user, kubelet = place
    with a_node(installation.kube, "spot") as node:
        user.create(make_job(runPolicy={"backoffLimit": 0}))
        kubelet.run("cats-1-0", node=node)
        user.wait_phase("Preparing")
        taint = {"key": "aws-node-termination-handler/spot-itn", "value": "1", "effect": "NoSchedule"}
        say(installation.kube, node, taint, ready="True")
        told = installation.kube.wait_for(
            "pods", "cats-1-0", lambda pod: "deletionTimestamp" in pod["metadata"], namespace=user.namespace
        )
        assert told["metadata"]["deletionGracePeriodSeconds"] == 120, "the trainer has its whole grace to save"
        kubelet.end("cats-1-0", 75, message=last_word(75, step=300))
        kubelet.remove("cats-1-0")
        kubelet.run("cats-2-0", node="elsewhere")
        status = user.wait_phase("Preparing", attempt=2)
        ended = status["attempts"][1]
        assert (ended["cause"], ended["reachedStep"], status["counters"]["failures"]) == ("Preempted", 300, 0)
        assert "aws-node-termination-handler/spot-itn" in ended["message"]
