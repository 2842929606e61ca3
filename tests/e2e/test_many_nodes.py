"""A job on two nodes with two processes each: it trains, loses a pod, starts again as a whole, and nothing is lost."""

from __future__ import annotations

import pytest
import yaml

from testkit import installation
from testkit.jobs import completed, hashes
from testkit.kube import KubectlError
from testkit.waiting import wait_until

STEPS = 6


def two_by_two(name, team):
    """Return the minimal example on all of the cluster's A100 nodes."""
    job = yaml.safe_load((installation.ROOT / "examples" / "minimal.yaml").read_text())
    job["metadata"]["name"] = name
    spec = job["spec"]
    spec["output"]["destination"] = f"s3://team-a/{team}/{name}/"
    spec["dataset"] |= {"resolution": 64, "filters": {"minSide": 32}}
    spec["training"] = {"maxSteps": STEPS, "batchSize": 4, "learningRate": 1e-2}
    spec["checkpoint"] = {"interval": "2steps"}
    spec["validation"] = {"everySteps": 5}
    spec["resources"] = {"profile": "a100-80gb", "nodes": 2, "gpusPerNode": 2}
    return job


def log_of(cluster, pod, team):
    """Return the pod's log so far; sooner than the status, which is written at leisure. Empty before it runs."""
    try:
        return cluster.kubectl("logs", pod, "-n", team)
    except KubectlError:
        return ""


@pytest.fixture(scope="module")
def undisturbed(platform, module_team):
    platform.cluster.apply(two_by_two("whole", module_team), namespace=module_team)
    return completed(platform.cluster, "whole", module_team)


def test_pods_on_two_nodes_train_as_one(platform, module_team, undisturbed):
    status = undisturbed["status"]
    assert status["attempt"] == 1
    assert (status["progress"]["step"], status["gpus"]) == (STEPS, 4)
    assert len(set(status["attempts"][0]["nodes"])) == 2, "each pod has a node of its own, in the order of the ranks"
    service = platform.cluster.get("services", "whole", namespace=module_team)
    assert service["metadata"]["ownerReferences"][0]["uid"] == undisturbed["metadata"]["uid"]
    assert service["spec"]["clusterIP"] == "None"


def test_a_lost_pod_restarts_the_whole_and_costs_nothing(platform, module_team, undisturbed):
    cluster = platform.cluster
    cluster.apply(two_by_two("halved", module_team), namespace=module_team)
    wait_until(
        lambda: "acknowledged" in log_of(cluster, "halved-1-0", module_team),
        describe="the first checkpoint",
        timeout=240,
        interval=0.2,
    )
    cluster.kubectl("delete", "pod", "halved-1-1", "-n", module_team, "--grace-period=0", "--force")
    job = completed(cluster, "halved", module_team)
    status = job["status"]
    assert (status["attempt"], status["attempts"][1]["cause"]) == (2, "Preempted")
    assert status["attempts"][0]["resumedFromStep"] >= 1
    assert len(status["attempts"][0]["nodes"]) == 2
    assert status["counters"].get("failures", 0) == 0
    assert hashes(job) == hashes(undisturbed)
    cluster.kubectl("delete", "dtj", "halved", "-n", module_team)
    cluster.wait_gone("services", "halved", namespace=module_team)
