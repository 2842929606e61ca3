"""The only writer: its order, what it does about names that are taken, and events that are told once."""

import asyncio
from typing import Any

import pytest

from diffusion_operator.apply import apply, tell
from diffusion_operator.decide import decide
from diffusion_operator.errors import ConflictError, RefusedError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.state import Decision, Job, Observed, SeenPod
from testkit.builders import NOW, Object, make_job, make_pod, make_profile
from testkit.fakes import MemoryCluster


def begin(cluster: MemoryCluster) -> tuple[Job, Decision, Knowledge]:
    """Return a job that is to be started, the decision to do so, and what is known."""
    cluster.add_profile(make_profile())
    raw = cluster.add_job(make_job())
    knowledge = Knowledge()
    knowledge.jobs.put(raw)
    job = Job.read(raw)
    return job, decide(job, Observed(trainer_image="t", profile=make_profile()), now=NOW), knowledge


def run(decision: Decision, job: Job, *, knowledge: Knowledge, cluster: MemoryCluster) -> bool:
    return asyncio.run(apply(decision, job, knowledge=knowledge, cluster=cluster))


def test_the_number_is_written_before_its_pods_are_created_and_what_was_written_is_known() -> None:
    cluster = MemoryCluster()
    job, decision, knowledge = begin(cluster)
    assert run(decision, job, knowledge=knowledge, cluster=cluster)
    assert cluster.writes == ["status cats", "create cats-1-0"]
    assert [pod.name for pod in knowledge.pods.of_job(job.uid)] == ["cats-1-0"]
    known = knowledge.jobs.get(job.uid)
    assert known is not None
    assert known["status"]["attempt"] == 1


def test_an_equal_status_is_not_written() -> None:
    cluster = MemoryCluster()
    job, decision, knowledge = begin(cluster)
    run(decision, job, knowledge=knowledge, cluster=cluster)
    again = Job.read(cluster.jobs["team-a", "cats"])
    assert not run(Decision(rule="x", status=again.status), again, knowledge=knowledge, cluster=cluster)
    assert len(cluster.writes) == 2


def test_no_pod_is_created_for_a_job_that_has_changed_meanwhile() -> None:
    cluster = MemoryCluster()
    job, decision, knowledge = begin(cluster)
    cluster.change_spec("team-a", "cats", suspend=True)
    with pytest.raises(ConflictError):
        run(decision, job, knowledge=knowledge, cluster=cluster)
    assert cluster.created == []


class TestNamesThatAreTaken:
    def taken(self, pod: Object) -> tuple[MemoryCluster, Any]:
        cluster = MemoryCluster()
        job, decision, knowledge = begin(cluster)
        cluster.pods["team-a", "cats-1-0"] = pod
        return cluster, lambda: run(decision, job, knowledge=knowledge, cluster=cluster) and knowledge

    def test_by_our_own_pod_it_counts_as_created(self) -> None:
        cluster, create = self.taken(make_pod(make_job()))
        assert create().refusals == {}
        assert cluster.created == []

    @pytest.mark.parametrize("other", [make_pod(make_job(uid="another")), make_pod(make_job(), attempt=7)])
    def test_by_anything_else_it_is_a_clear_error(self, other: Object) -> None:
        cluster, create = self.taken({**other, "metadata": {**other["metadata"], "name": "cats-1-0"}})
        with pytest.raises(RefusedError, match="cats-1-0"):
            create()
        assert cluster.created == []

    def test_it_is_said_in_the_status(self) -> None:
        cluster = MemoryCluster()
        job, decision, knowledge = begin(cluster)
        cluster.pods["team-a", "cats-1-0"] = make_pod(make_job(uid="another"))
        with pytest.raises(RefusedError):
            run(decision, job, knowledge=knowledge, cluster=cluster)
        assert knowledge.refusals[job.uid].cause == "PodNameTaken"
        assert "kubectl delete pod cats-1-0" in knowledge.refusals[job.uid].hint


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ('pods "cats-1-0" is forbidden: exceeded quota: gpus', "QuotaExceeded"),
        ('pods "cats-1-0" is forbidden: violates PodSecurity "restricted:latest"', "PodSecurityRejected"),
        ("Pod is invalid: metadata.annotations: Too long", "AdmissionRejected"),
    ],
)
def test_a_refused_pod_is_remembered_until_it_is_created(answer: str, cause: str) -> None:
    cluster = MemoryCluster()
    job, decision, knowledge = begin(cluster)
    run(Decision(rule="x", status=decision.status), job, knowledge=knowledge, cluster=cluster)
    job = Job.read(cluster.jobs["team-a", "cats"])
    cluster.errors = [RefusedError(answer)]
    create = Decision(rule="x", create=decision.create)
    with pytest.raises(RefusedError):
        run(create, job, knowledge=knowledge, cluster=cluster)
    assert knowledge.refusals[job.uid].cause == cause
    run(create, job, knowledge=knowledge, cluster=cluster)
    assert knowledge.refusals == {}


def test_a_pod_that_is_gone_already_is_deleted_with_success() -> None:
    cluster = MemoryCluster()
    job, _, knowledge = begin(cluster)
    pod = make_pod(make_job(), phase="Failed")
    knowledge.pods.put(pod)
    run(Decision(rule="x", delete=(SeenPod(pod),)), job, knowledge=knowledge, cluster=cluster)
    assert [found.gone for found in knowledge.pods.of_job(job.uid)] == [True]


def test_another_pod_under_the_same_name_is_never_deleted() -> None:
    cluster = MemoryCluster()
    job, _, knowledge = begin(cluster)
    cluster.pods["team-a", "cats-1-0"] = make_pod(make_job(), metadata={"uid": "newer"})
    known = make_pod(make_job())
    knowledge.pods.put(known)
    run(Decision(rule="x", delete=(SeenPod(known),)), job, knowledge=knowledge, cluster=cluster)
    assert cluster.pods["team-a", "cats-1-0"]["metadata"]["uid"] == "newer"
    assert [pod.gone for pod in knowledge.pods.of_job(job.uid)] == [True]


class TestEvents:
    def tell(self, cluster: MemoryCluster, knowledge: Knowledge) -> list[str]:
        job = Job.read(cluster.jobs["team-a", "cats"])
        asyncio.run(tell(job, now=NOW, knowledge=knowledge, cluster=cluster))
        return sorted(event["reason"] for event in cluster.events.values())

    def test_each_is_told_once_also_after_a_restart(self) -> None:
        cluster = MemoryCluster()
        job, decision, knowledge = begin(cluster)
        run(decision, job, knowledge=knowledge, cluster=cluster)
        assert self.tell(cluster, knowledge) == ["AttemptStarted", "Validated"]
        asked = len(cluster.writes)
        assert self.tell(cluster, knowledge) == ["AttemptStarted", "Validated"]
        assert len(cluster.writes) == asked
        assert self.tell(cluster, Knowledge()) == ["AttemptStarted", "Validated"]

    def test_a_refused_event_does_not_hold_up_the_job(self, caplog: pytest.LogCaptureFixture) -> None:
        cluster = MemoryCluster()
        job, decision, knowledge = begin(cluster)
        run(decision, job, knowledge=knowledge, cluster=cluster)
        cluster.errors = [RefusedError("events is forbidden")]
        assert self.tell(cluster, knowledge) == ["AttemptStarted"]
        assert "events is forbidden" in caplog.text


@pytest.mark.parametrize("gone", [False, True])
def test_a_conflict_at_a_deletion_means_another_pod_only_where_there_is_one(gone: bool) -> None:
    """Found by the world model with two nodes: the next attempt began beside a pod that still ran."""
    cluster = MemoryCluster()
    job, decision, knowledge = begin(cluster)
    run(decision, job, knowledge=knowledge, cluster=cluster)
    (pod,) = knowledge.pods.of_job(job.uid)
    cluster.errors = [ConflictError("409")]
    if gone:
        cluster.pods["team-a", "cats-1-0"]["metadata"]["uid"] = "another"
        run(Decision(rule="x", delete=(pod,)), job, knowledge=knowledge, cluster=cluster)
    else:
        with pytest.raises(ConflictError):
            run(Decision(rule="x", delete=(pod,)), job, knowledge=knowledge, cluster=cluster)
    assert [found.gone for found in knowledge.pods.of_job(job.uid)] == [gone]
