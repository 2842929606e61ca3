"""One job through everything that can happen to a pod, on the real control plane: nothing is counted, nothing is lost.

Each disturbance meets the job at work, on one of the two nodes that have its GPUs, so that the next attempt finds a
place on the other one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from testkit.cluster import ClusterHandle
from testkit.jobs import JOBS, completed, hashes, small_job, trains
from testkit.kube import Object
from testkit.pods import pod

SPOT = "aws-node-termination-handler/spot-itn=i-0123:NoSchedule"
MAINTENANCE = "maintenance=now:NoExecute"


class Storm:
    """The job, and what is done to it."""

    def __init__(self, cluster: ClusterHandle, team: str) -> None:
        self.cluster = cluster
        self.team = team
        self.attempt = 1
        self.cluster.apply(small_job("storm", team), namespace=team)

    def works(self) -> str:
        """Wait until the attempt trains; return its node."""
        return trains(self.cluster, "storm", self.team, attempt=self.attempt)

    def goes_on(self, node: str) -> Object:
        """Wait until the next attempt trains, on another node than the one that it lost; return the one before it."""
        self.attempt += 1
        assert self.works() != node
        status = self.status()
        (found,) = [entry for entry in status["attempts"] if entry["number"] == self.attempt - 1]
        assert found["nodes"] == [node]
        assert (status["counters"].get("failures", 0), status["counters"]["restarts"]) == (0, self.attempt - 1)
        return found

    def status(self) -> Object:
        status: Object = self.cluster.get(JOBS, "storm", namespace=self.team)["status"]
        return status


@pytest.fixture(scope="module")
def storm(platform, module_team, undisturbed: Object) -> Storm:
    # After the undisturbed one and not beside it: two trainings at once take twice as long.
    assert undisturbed
    return Storm(platform.cluster, module_team)


@contextlib.contextmanager
def a_higher_priority(cluster: ClusterHandle, name: str) -> Iterator[str]:
    made = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": 1000}
    cluster.apply(made)
    yield name
    cluster.api.delete("priorityclasses", name)


def test_a_pod_with_a_higher_priority_takes_its_gpu(cluster: ClusterHandle, storm: Storm):
    node = storm.works()
    image = cluster.load_image("testkit/python:1", entrypoint=["python", "-c"])
    with a_higher_priority(cluster, storm.team) as priority:
        where = {"nodeSelector": {"kubernetes.io/hostname": node}, "priorityClassName": priority}
        gpu = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
        cluster.apply(pod("dear", image=image, args=["pass"], gpus=2, tolerations=gpu, **where), namespace=storm.team)
        ended = storm.goes_on(node)
        cluster.wait_phase("dear", "Succeeded", namespace=storm.team)
    assert ended["cause"] == "Preempted"
    assert "PreemptionByScheduler" in ended["message"]


def test_its_node_is_drained(cluster: ClusterHandle, storm: Storm):
    node = storm.works()
    cluster.drain(node)
    ended = storm.goes_on(node)
    assert ended["cause"] == "Preempted"
    assert "EvictionByEvictionAPI" in ended["message"]


def test_its_node_gets_a_taint_with_no_execute(cluster: ClusterHandle, storm: Storm):
    node = storm.works()
    cluster.taint(node, MAINTENANCE)
    ended = storm.goes_on(node)
    assert ended["cause"] == "Preempted"
    assert "DeletionByTaintManager" in ended["message"]


def test_its_spot_node_is_to_be_interrupted(cluster: ClusterHandle, storm: Storm):
    node = storm.works()
    cluster.taint(node, SPOT)
    ended = storm.goes_on(node)
    assert ended["cause"] == "Preempted"
    assert "spot-itn" in ended["message"]
    assert ended["exitCode"] == 75, "it has saved what it had"


def test_it_is_suspended_and_resumed(cluster: ClusterHandle, storm: Storm):
    storm.works()
    cluster.api.patch(JOBS, "storm", {"spec": {"suspend": True}}, namespace=storm.team)
    cluster.kubectl("wait", "--for=condition=Suspended", "dtj/storm", "-n", storm.team, "--timeout=120s")
    cluster.wait_gone("pods", f"storm-{storm.attempt}-0", namespace=storm.team)
    cluster.api.patch(JOBS, "storm", {"spec": {"suspend": False}}, namespace=storm.team)
    storm.attempt += 1
    storm.works()
    assert storm.status()["attempts"][1]["cause"] == "Suspended"


def test_its_pod_is_deleted(cluster: ClusterHandle, storm: Storm):
    storm.works()
    cluster.api.delete("pods", f"storm-{storm.attempt}-0", namespace=storm.team)
    storm.attempt += 1
    storm.works()
    assert storm.status()["attempts"][1]["cause"] == "Preempted"


def test_its_node_is_lost_at_once(cluster: ClusterHandle, storm: Storm):
    node = storm.works()
    cluster.lose_node(node)
    ended = storm.goes_on(node)
    assert ended["cause"] == "NodeLost"
    assert f"node {node}" in ended["message"]


def test_it_ends_as_if_nothing_had_been(cluster: ClusterHandle, storm: Storm, undisturbed: Object):
    storm.works()
    job = completed(cluster, "storm", storm.team)
    # Which tests ran is pytest's choice; each has ended one attempt.
    assert job["status"]["attempt"] == storm.attempt
    assert hashes(job) == hashes(undisturbed)
