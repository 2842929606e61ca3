"""From what was observed to `status.pending`: what is asked for, how often, and what the status then says."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from diffusion_api.waiting import WaitingCause
from diffusion_operator import surroundings
from diffusion_operator.decide import decide
from diffusion_operator.knowledge import AROUND_SECONDS, Knowledge
from diffusion_operator.observe import observe
from diffusion_operator.policies.attempt_runs import LOOK_AGAIN_SECONDS, LOOK_AROUND_SECONDS
from diffusion_operator.settings import Settings
from diffusion_operator.state import Decision, Job, Object, Observed, SeenPod, Surroundings
from diffusion_operator.status import to_object
from testkit.builders import NOW, at, container, make_job, make_pod, make_profile
from testkit.fakes import MemoryCluster, SilentProgress

GPU = make_profile()["spec"]["resourceName"]
BUSY = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1 nodes are available: 1 No victims."


def running_status() -> Object:
    """Return the status of a job whose first attempt has begun."""
    status = decide(Job.read(make_job()), Observed(trainer_image="t", profile=make_profile()), now=NOW).status
    assert status is not None
    return to_object(status)


def unschedulable(message: str = BUSY, **changes: Any) -> Object:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    pod = make_pod(make_job(), status={"conditions": [condition]}, **changes)
    pod["spec"]["containers"] = [{"name": "trainer", "resources": {"requests": {GPU: "1"}}}]
    return pod


def node(gpus: int = 1) -> Object:
    return {
        "metadata": {"name": "n1"},
        "status": {"allocatable": {GPU: str(gpus)}, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def holder(name: str = "dogs-1-0") -> Object:
    return {
        "metadata": {"name": name, "namespace": "team-b", "uid": name},
        "spec": {"nodeName": "n1", "containers": [{"resources": {"requests": {GPU: "1"}}}]},
    }


def look(*pods: Object, around: Surroundings | None = None, events: tuple[Object, ...] = ()) -> Decision:
    """Return the decision about a running attempt with these pods."""
    job = Job.read(make_job(status=running_status()))
    seen = Observed(
        trainer_image="t",
        pods=tuple(SeenPod(pod) for pod in pods),
        profile=make_profile(),
        pod_events=events,
        around=around,
    )
    return decide(job, seen, now=NOW)


def test_who_holds_the_gpus_is_in_the_status() -> None:
    decision = look(unschedulable(), around=Surroundings(nodes=(node(),), pods=(holder(),)))
    assert decision.status is not None
    pending = decision.status.pending
    assert pending is not None
    assert pending.cause == WaitingCause.INSUFFICIENT_GPU
    assert "team-b/dogs-1-0 1" in pending.detail
    assert "spec.resources.profile" in pending.hint
    assert decision.again_seconds == LOOK_AROUND_SECONDS


def test_without_the_right_to_look_around_the_scheduler_speaks() -> None:
    decision = look(unschedulable(), around=Surroundings())
    assert decision.status is not None
    assert decision.status.pending is not None
    assert decision.status.pending.detail == BUSY


def test_a_missing_secret_is_read_from_events() -> None:
    pod = make_pod(make_job(), node="n1", status=container(waiting={"reason": "ContainerCreating"}))
    event = {
        "reason": "FailedMount",
        "message": 'MountVolume.SetUp failed for volume "credentials" : secret "team-a-s3" not found',
        "lastTimestamp": at(0),
        "involvedObject": {"kind": "Pod", "uid": pod["metadata"]["uid"]},
    }
    decision = look(pod, events=(event,))
    assert decision.status is not None
    assert decision.status.pending is not None
    assert decision.status.pending.cause == WaitingCause.MISSING_SECRET
    assert decision.again_seconds == LOOK_AGAIN_SECONDS


def test_a_pod_that_just_starts_has_nothing_pending() -> None:
    pod = make_pod(make_job(), node="n1", status=container(waiting={"reason": "ContainerCreating"}))
    decision = look(pod)
    assert decision.status is not None
    assert decision.status.pending is None


def test_the_detail_stays_the_same_while_nothing_changes() -> None:
    """A detail with a running clock would be a status write with each look."""
    pod = make_pod(make_job(), node="n1", status=container(waiting={"reason": "ContainerCreating"}))
    event = {
        "reason": "Pulling",
        "message": 'Pulling image "x"',
        "lastTimestamp": at(0),
        "involvedObject": {"kind": "Pod", "uid": pod["metadata"]["uid"]},
    }
    job = Job.read(make_job(status=running_status()))
    seen = Observed(trainer_image="t", pods=(SeenPod(pod),), profile=make_profile(), pod_events=(event,))
    details = {
        decision.status.pending.detail
        for seconds in (0, 10, 20)
        if (decision := decide(job, seen, now=NOW + timedelta(seconds=seconds))).status and decision.status.pending
    }
    assert len(details) == 1


class TestLookingAround:
    def see(self, cluster: MemoryCluster, knowledge: Knowledge, *, seconds: float = 0) -> Observed:
        job = Job.read(make_job(status=running_status()))
        return asyncio.run(
            observe(
                job,
                knowledge=knowledge,
                cluster=cluster,
                progress=SilentProgress(),
                settings=Settings(trainer_image="t", preflight=False),
                now=NOW + timedelta(seconds=seconds),
            )
        )

    @pytest.mark.parametrize(
        ("pod", "looks"),
        [
            (unschedulable(), 1),
            (make_pod(make_job()), 0),
            (make_pod(make_job(), node="n1"), 0),
            (make_pod(make_job(), phase="Running", node="n1"), 0),
        ],
    )
    def test_only_for_a_pod_that_finds_no_node(self, pod: Object, looks: int) -> None:
        cluster, knowledge = MemoryCluster(), Knowledge()
        knowledge.pods.put(pod)
        assert (self.see(cluster, knowledge).around is not None) == bool(looks)
        assert cluster.looks == looks

    def test_not_more_often_than_stated_however_many_ask(self) -> None:
        cluster, knowledge = MemoryCluster(), Knowledge()
        knowledge.pods.put(unschedulable())
        for seconds in range(0, 2 * AROUND_SECONDS, 5):
            self.see(cluster, knowledge, seconds=seconds)
        assert cluster.looks == 2

    def test_with_the_ends_that_running_jobs_expect(self) -> None:
        cluster, knowledge = MemoryCluster(), Knowledge()
        progress = {"step": 5, "totalSteps": 10, "estimatedRemainingSeconds": 600, "lastUpdatedTime": at(0)}
        ready = {
            "type": "PodsReady", "status": "True", "reason": "Running", "message": "", "lastTransitionTime": at(0)
        }  # fmt: skip
        status = running_status() | {"progress": progress, "conditions": [ready]}
        knowledge.jobs.put(make_job(name="dogs", uid="another", status=status))
        knowledge.pods.put(unschedulable())
        around = self.see(cluster, knowledge).around
        assert around is not None
        assert around.job_ends == {"team-a/dogs": NOW + timedelta(seconds=600)}


def test_what_is_kept_of_nodes_and_pods_decides_about_placing_and_nothing_else() -> None:
    raw = node() | {"spec": {"taints": [], "podCIDR": "10.0.0.0/24"}}
    raw["status"]["images"] = [{"names": ["x" * 100]}] * 50
    assert surroundings.node(raw) == node() | {"spec": {"taints": []}}
    pod = holder() | {"status": {"phase": "Running", "podIP": "10.0.0.9"}}
    pod["spec"]["containers"][0] |= {"name": "main", "env": [{"name": "TOKEN", "value": "secret"}]}
    assert "secret" not in str(surroundings.placed_pod(pod))
    assert surroundings.placed_pod(pod)["spec"]["containers"] == holder()["spec"]["containers"]
