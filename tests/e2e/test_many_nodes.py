"""A job on two nodes: it trains, loses a pod, starts again as a whole, and nothing is lost.

Nightly, because two cores take minutes for the starts alone. tests/integration/test_many_processes.py does the same
with two pods that are processes.
"""

from __future__ import annotations

import pytest
import yaml

from testkit import installation
from testkit.jobs import completed, hashes
from testkit.kube import KubectlError
from testkit.waiting import wait_until

STEPS = 6


def on_two_nodes(name, team, *, gpus):
    """Return the minimal example on the cluster's A100 nodes."""
    job = yaml.safe_load((installation.ROOT / "examples" / "minimal.yaml").read_text())
    job["metadata"]["name"] = name
    spec = job["spec"]
    spec["output"]["destination"] = f"s3://team-a/{team}/{name}/"
    spec["dataset"] |= {"resolution": 64, "filters": {"minSide": 32}}
    spec["training"] = {"maxSteps": STEPS, "batchSize": 4, "learningRate": 1e-2}
    spec["checkpoint"] = {"interval": "2steps"}
    spec["validation"] = {"everySteps": 5}
    spec["resources"] = {"profile": "a100-80gb", "nodes": 2, "gpusPerNode": gpus}
    return job


def log_of(cluster, pod, team):
    """Return the pod's log so far; sooner than the status, which is written at leisure. Empty before it runs."""
    try:
        return cluster.kubectl("logs", pod, "-n", team)
    except KubectlError:
        return ""


@pytest.mark.nightly
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_lost_pod_restarts_the_whole_and_costs_nothing(platform, team, gpus):
    cluster = platform.cluster
    cluster.apply(on_two_nodes("whole", team, gpus=gpus), namespace=team)
    undisturbed = completed(cluster, "whole", team)
    trained_as_one(cluster, undisturbed, gpus=gpus)
    cluster.apply(on_two_nodes("halved", team, gpus=gpus), namespace=team)
    wait_until(
        lambda: "acknowledged" in log_of(cluster, "halved-1-0", team),
        describe="the first checkpoint",
        timeout=240,
        interval=0.2,
    )
    cluster.kubectl("delete", "pod", "halved-1-1", "-n", team, "--grace-period=0", "--force")
    job = completed(cluster, "halved", team)
    status = job["status"]
    assert (status["attempt"], status["attempts"][1]["cause"]) == (2, "Preempted")
    assert status["attempts"][0]["resumedFromStep"] >= 1
    assert len(status["attempts"][0]["nodes"]) == 2
    assert status["counters"].get("failures", 0) == 0
    assert hashes(job) == hashes(undisturbed)
    cluster.kubectl("delete", "dtj", "halved", "-n", team)
    cluster.wait_gone("services", "halved", namespace=team)


def trained_as_one(cluster, job, *, gpus):
    """Check that both nodes took part, by the stable names of one Service."""
    metadata, status = job["metadata"], job["status"]
    assert status["attempt"] == 1
    assert (status["progress"]["step"], status["gpus"]) == (STEPS, 2 * gpus)
    assert len(set(status["attempts"][0]["nodes"])) == 2, "each pod has a node of its own, in the order of the ranks"
    service = cluster.get("services", "whole", namespace=metadata["namespace"])
    assert service["metadata"]["ownerReferences"][0]["uid"] == metadata["uid"]
    assert service["spec"]["clusterIP"] == "None"
