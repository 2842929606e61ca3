"""Jobs in a queue of a real Kueue: one waits and says why, one is evicted and goes on from its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from diffusion_api import names
from testkit import installation, kueue
from testkit.kube import condition
from testkit.waiting import wait_until

# Two minutes of a real cluster. `integration/test_queues.py` has the same in every run of the tests, with a real Kueue
# and played nodes.
pytestmark = pytest.mark.nightly

JOBS = f"{names.JOB_PLURAL}.{names.GROUP}"
STEPS = 80
"""Enough for the job to be still at work when it is evicted, also on a fast machine."""
FEW = 4
PLENTY = {"cpu": "100", "memory": "1000Gi", "ephemeral-storage": "1000Gi"}


@pytest.fixture(scope="module")
def queue(platform, module_team) -> Iterator[None]:
    """Kueue, two priorities, and a queue for one GPU."""
    cluster = platform.cluster
    with kueue.installed(cluster, exempt=[platform.operator_namespace]):
        cluster.apply(
            kueue.priority_class("research", value=10),
            kueue.priority_class("urgent", value=1000),
            kueue.resource_flavor("a100"),
            kueue.cluster_queue("team", flavor="a100", quota={"nvidia.com/gpu": 1, **PLENTY}),
        )
        cluster.apply(kueue.local_queue("main", cluster_queue="team"), namespace=module_team)
        yield


def job(name, team, *, priority="research", steps=FEW):
    """Return the minimal example, small enough for a test, in the queue."""
    made = yaml.safe_load((installation.ROOT / "examples" / "minimal.yaml").read_text())
    labels = {names.LABEL_QUEUE: "main", names.LABEL_QUEUE_PRIORITY: priority}
    made["metadata"] |= {"name": name, "labels": labels}
    spec = made["spec"]
    spec["output"]["destination"] = f"s3://team-a/{team}/{name}/"
    spec["dataset"] |= {"resolution": 64, "filters": {"minSide": 32}}
    spec["training"] = {"maxSteps": steps, "batchSize": 2}
    spec["checkpoint"] = {"interval": "10steps"}
    spec["validation"] = {"everySteps": steps}
    return made


@pytest.mark.usefixtures("queue")
def test_jobs_share_a_quota_and_an_evicted_one_goes_on_from_its_checkpoint(platform, module_team):
    cluster, team = platform.cluster, module_team

    def wait(name, until, describe=""):
        return cluster.wait_for(JOBS, name, until, namespace=team, timeout=280, describe=describe)["status"]

    def waits_for_quota(found):
        status = found.get("status", {})
        return status.get("phase") == "Queued" and (status.get("pending") or {}).get("cause") == "WaitingForQuota"

    def complete(found):
        assert condition(found, "Failed").get("status") != "True", condition(found, "Failed")
        return condition(found, "Complete").get("status") == "True"

    cluster.apply(job("first", team, steps=STEPS), namespace=team)
    cluster.wait_log("first-1-0", "acknowledged", namespace=team, timeout=120)
    cluster.apply(job("second", team), namespace=team)
    waiting = wait("second", waits_for_quota, "Queued")
    assert waiting["pending"]["detail"].startswith("place 1 in the queue; queue main: ")
    assert "insufficient unused quota for nvidia.com/gpu" in waiting["pending"]["detail"]
    assert "kueue.x-k8s.io/priority-class" in waiting["pending"]["hint"]
    cluster.apply(job("urgent", team, priority="urgent"), namespace=team)
    evicted = wait("first", lambda found: waits_for_quota(found) and found["status"]["attempt"] == 2, "its eviction")
    assert (evicted["attempts"][1]["cause"], evicted["workload"]) == ("Preempted", f"first-{uid(cluster, team)}-1")
    assert evicted["checkpoint"]["latest"]["step"] == evicted["attempts"][1]["reachedStep"], "it saved before it went"
    for name in ("urgent", "first", "second"):
        status = wait(name, complete, "its end")
        assert status["counters"].get("failures", 0) == 0
        if name == "first":
            assert status["attempts"][0]["resumedFromStep"] == evicted["checkpoint"]["latest"]["step"]
            assert (status["progress"]["step"], status["counters"]["preemptions"]) == (STEPS, 1)
    starts = [cluster.get("pods", name, namespace=team)["status"]["startTime"] for name in ("first-2-0", "second-1-0")]
    assert starts == sorted(starts), "the evicted job has kept its place before the second one"
    wait_until(lambda: _usage(cluster) == "0", describe="the quota to be free again", timeout=60)


def uid(cluster, team):
    return cluster.get(JOBS, "first", namespace=team)["metadata"]["uid"][:8]


def _usage(cluster):
    flavors = cluster.get("clusterqueues", "team")["status"].get("flavorsUsage", [])
    resources = {entry["name"]: entry["total"] for flavor in flavors for entry in flavor["resources"]}
    return resources.get("nvidia.com/gpu", "0")
