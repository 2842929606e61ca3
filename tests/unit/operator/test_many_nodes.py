"""Jobs on several nodes: pods that find each other, start and end together, and whose ends have one cause."""

import asyncio
from typing import Any

import pytest

from diffusion_api import names
from diffusion_api.outcomes import Cause
from diffusion_api.run import RunConfig
from diffusion_operator.apply import apply
from diffusion_operator.decide import decide
from diffusion_operator.errors import RefusedError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.policies.evidence import ending_of
from diffusion_operator.state import Decision, Job, Observed, SeenPod
from diffusion_operator.status import to_object
from testkit.builders import (
    NOW,
    Object,
    deleting,
    disrupted,
    last_word,
    make_checkpoint,
    make_job,
    make_pod,
    make_profile,
    terminated,
)
from testkit.fakes import MemoryCluster

PROFILE = make_profile(maxGpusPerNode=2)


def two_nodes(**more: Any) -> Object:
    return make_job(resources={"nodes": 2, "gpusPerNode": 2}, training={"batchSize": 8}, **more)


def ask(job: Object, *pods: SeenPod) -> Decision:
    return decide(Job.read(job), Observed(trainer_image="t", profile=PROFILE, pods=pods), now=NOW)


def started() -> Object:
    job = two_nodes()
    status = ask(job).status
    assert status is not None
    return {**job, "status": to_object(status)}


def seen(job: Object, rank: int, *, gone: bool = False, **more: Any) -> SeenPod:
    return SeenPod(make_pod(job, rank=rank, node=f"n{9 - rank}", **{"phase": "Running", **more}), gone=gone)


def running(job: Object) -> Object:
    """Return the job after all its pods were seen to run."""
    status = ask(job, seen(job, 0), seen(job, 1)).status
    assert status is not None
    return {**job, "status": to_object(status)}


# --- what is created ---


def test_pods_and_service_have_names_by_which_they_find_each_other() -> None:
    service, *pods = ask(two_nodes()).create
    assert (service["kind"], service["metadata"]["name"], service["spec"]["clusterIP"]) == ("Service", "cats", "None")
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["metadata"]["ownerReferences"] == pods[0]["metadata"]["ownerReferences"]
    selector = service["spec"]["selector"].items()
    for rank, pod in enumerate(pods):
        assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == (f"cats-1-{rank}", "cats")
        assert selector <= pod["metadata"]["labels"].items()
        run = RunConfig.model_validate_json(pod["metadata"]["annotations"][names.ANNOTATION_RUN])
        assert (run.node_rank, run.nodes, run.processes_per_node, run.world_size) == (rank, 2, 2, 4)
        assert run.rendezvous is not None
        assert (run.rendezvous.host, run.rendezvous.port) == ("cats-1-0.cats", names.RENDEZVOUS_PORT)
        assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"


def test_each_pod_of_an_attempt_has_a_node_of_its_own() -> None:
    pod = ask(two_nodes()).create[1]
    (term,) = pod["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    labels = pod["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"].items() <= labels.items()
    assert names.LABEL_ATTEMPT in term["labelSelector"]["matchLabels"], "pods of an older attempt may be stuck"
    assert "nodeAffinity" in pod["spec"]["affinity"]


def test_one_node_needs_none_of_it() -> None:
    (pod,) = ask(make_job(resources={"gpusPerNode": 2})).create
    assert "hostname" not in pod["spec"]
    assert "podAntiAffinity" not in pod["spec"]["affinity"]
    run = RunConfig.model_validate_json(pod["metadata"]["annotations"][names.ANNOTATION_RUN])
    assert (run.rendezvous, run.world_size) == (None, 2)


def test_more_gpus_per_node_than_the_profile_has_are_refused() -> None:
    decision = ask(make_job(resources={"gpusPerNode": 4}))
    assert decision.status is not None
    assert decision.create == ()
    assert "spec.resources.gpusPerNode: 4" in decision.status.message


def test_what_a_crash_left_out_is_created_and_the_service_again() -> None:
    job = started()
    decision = ask(job, SeenPod(make_pod(job, rank=0)))
    assert [item["metadata"]["name"] for item in decision.create] == ["cats", "cats-1-1"]


def create(cluster: MemoryCluster) -> Knowledge:
    raw = cluster.add_job(two_nodes())
    knowledge = Knowledge()
    knowledge.jobs.put(raw)
    asyncio.run(apply(ask(raw), Job.read(raw), knowledge=knowledge, cluster=cluster))
    return knowledge


def test_the_service_comes_before_the_pods_and_may_be_there_already() -> None:
    cluster = MemoryCluster()
    create(cluster)
    assert cluster.writes == ["status cats", "create service cats", "create cats-1-0", "create cats-1-1"]
    again = MemoryCluster(services=cluster.services)
    create(again)
    assert again.created == ["cats-1-0", "cats-1-1"]


def test_a_service_of_somebody_else_is_named() -> None:
    cluster = MemoryCluster()
    cluster.services["team-a", "cats"] = {"metadata": {"name": "cats", "namespace": "team-a", "uid": "x"}}
    raw = cluster.add_job(two_nodes())
    knowledge = Knowledge()
    with pytest.raises(RefusedError, match="service cats: the name is taken"):
        asyncio.run(apply(ask(raw), Job.read(raw), knowledge=knowledge, cluster=cluster))
    refusal = knowledge.refusals[raw["metadata"]["uid"]]
    assert (refusal.cause, cluster.created) == ("ServiceNameTaken", [])
    assert "kubectl delete service cats --namespace team-a" in refusal.hint


# --- how it runs ---


def test_nodes_are_told_in_the_order_of_the_ranks_and_rank_0_is_polled() -> None:
    job = started()
    decision = ask(job, seen(job, 1), seen(job, 0))
    assert decision.status is not None
    assert decision.status.attempts[0].nodes == ("n9", "n8")
    assert decision.poll is not None
    assert decision.poll.name == "cats-1-0"


def test_ranks_are_numbers() -> None:
    job = make_job(resources={"nodes": 12, "gpusPerNode": 1}, training={"batchSize": 12})
    status = ask(job).status
    assert status is not None
    job = {**job, "status": to_object(status)}
    pods = [SeenPod(make_pod(job, rank=rank, phase="Running", node=f"n{rank}")) for rank in (10, 2, *range(2), 11)]
    pods += [SeenPod(make_pod(job, rank=rank, phase="Running", node=f"n{rank}")) for rank in range(3, 10)]
    status = ask(job, *pods).status
    assert status is not None
    assert status.attempts[0].nodes == tuple(f"n{rank}" for rank in range(12))


# --- how it ends ---


def failed(code: int, *, finished: float = 0, **word: Any) -> dict[str, Any]:
    return {"phase": "Failed", "status": terminated(code, message=last_word(code, **word), finished=finished)}


def killed(code: int = 137, *, finished: float = 0) -> dict[str, Any]:
    return {"phase": "Failed", "status": terminated(code, finished=finished)}


def stopped(code: int = 75, *, asked: float = 0, finished: float = 3) -> dict[str, Any]:
    """Return a pod that was deleted and had the time to stop."""
    return failed(code, finished=finished) | {"metadata": deleting(asked=asked, grace=120)}


NODE_GONE = {"gone": True, "metadata": deleting(asked=-60, grace=30), "status": disrupted("DeletionByTaintManager")}

ENDS: list[tuple[str, dict[str, Any], dict[str, Any], Cause]] = [
    ("one ran out of GPU memory, the other lost it", failed(81), failed(80), Cause.CUDA_OUT_OF_MEMORY),
    ("the same, told the other way round", failed(80), failed(81), Cause.CUDA_OUT_OF_MEMORY),
    ("one hangs, the other waits for it", failed(83), failed(81, finished=-1), Cause.HANG),
    ("one diverged, the other lost it", failed(70), failed(81), Cause.DIVERGED),
    ("one is a zombie", failed(84), failed(81), Cause.FENCED),
    ("one crashed, the other lost it", failed(81), killed(1), Cause.CRASH),
    ("one was killed by the kernel, the other lost it", failed(81), killed(137), Cause.CRASH),
    ("both lost each other", failed(81), failed(81), Cause.COLLECTIVE_TIMEOUT),
    ("both crashed: the first one counts", killed(1, finished=2), failed(82, finished=1), Cause.GPU_FAULT),
    ("both crashed: the first one counts, told the other way round", failed(82, finished=1), killed(1, finished=2),
     Cause.GPU_FAULT),
    ("one crashed, and so the operator stopped the other", stopped(asked=1, finished=4), killed(1), Cause.CRASH),
    ("the same, by clocks that differ", stopped(asked=-3, finished=4), killed(1), Cause.CRASH),
    ("the same, by a node that does not say when", stopped(asked=-3, finished=4),
     {"phase": "Failed", "status": {"containerStatuses": [
         {"name": "trainer", "state": {"terminated": {"exitCode": 1}}}]}}, Cause.CRASH),
    ("one lost the other, and so the operator stopped that", stopped(asked=1), failed(81), Cause.COLLECTIVE_TIMEOUT),
    ("one was deleted, the other stopped with it", stopped(asked=-5), failed(75, finished=3), Cause.PREEMPTED),
    ("one was deleted by force, the other lost it",
     {"gone": True, "metadata": deleting(asked=-5, grace=0)}, failed(81, finished=-2), Cause.PREEMPTED),
    ("one was drained, the other stopped with it",
     stopped(asked=-5) | {"status": terminated(75, message=last_word(75)) | disrupted("EvictionByEvictionAPI")},
     failed(75), Cause.PREEMPTED),
    ("a node is gone, and what the other says came first", NODE_GONE, failed(81, finished=-90), Cause.NODE_LOST),
    ("one node stopped answering after the operator stopped its pod",
     {"metadata": deleting(asked=-200, grace=30)}, failed(81, finished=-205), Cause.NODE_LOST),
    ("both are done", failed(0), failed(0), Cause.COMPLETED),
    ("one is done, the other was stopped too early", failed(0), stopped(asked=1), Cause.PREEMPTED),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "cause"), [end[1:] for end in ENDS], ids=[end[0] for end in ENDS])
def test_the_cause_of_several_ends_is_that_which_explains_them(
    first: dict[str, Any], second: dict[str, Any], cause: Cause
) -> None:
    job = two_nodes()
    pods = (seen(job, 0, **first), seen(job, 1, **second))
    assert ending_of(pods, stopped=False, now=NOW).cause == cause
    assert ending_of(pods[::-1], stopped=False, now=NOW).cause == cause


def test_of_the_root_cause_the_words_and_the_code_are_kept_and_of_rank_0_the_checkpoint() -> None:
    job = running(started())
    first = seen(job, 0, **failed(81, message="lost", step=7, latest_checkpoint=make_checkpoint(6)))
    second = seen(job, 1, **failed(80, message="no memory", step=7, last_lines="the stack"))
    status = ask(job, first, second).status
    assert status is not None
    ended = status.attempts[1]
    assert (ended.cause, ended.exit_code, ended.message) == ("CudaOutOfMemory", 80, "no memory")
    assert (ended.last_lines, ended.reached_step, ended.nodes) == ("the stack", 7, ("n9", "n8"))
    assert status.checkpoint is not None
    assert status.checkpoint.latest == make_checkpoint(6)
    assert status.counters.out_of_memory_retunes == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_the_status_says_where_the_logs_are_whichever_pod_could_put_them_there(rank: int) -> None:
    job = running(started())
    where = "s3://team-a/models/cats/logs/attempt-0001/"
    pods = (seen(job, n, **failed(80, message="no memory", **({"log": where} if n == rank else {}))) for n in (0, 1))
    status = ask(job, *pods).status
    assert status is not None
    assert status.attempts[1].log == where


@pytest.mark.parametrize("left", [0, 1])
def test_a_pod_that_went_while_no_operator_was_there_is_missed(left: int) -> None:
    job = running(started())
    decision = ask(job, seen(job, left))
    assert [pod.name for pod in decision.delete] == [f"cats-1-{left}"]
    assert decision.create == ()
    yielded = seen(job, left, **failed(75, message="told to stop"))
    after = ask(job, yielded)
    assert after.status is not None
    assert (after.status.attempt, after.status.attempts[1].cause) == (2, "Preempted")
    assert after.status.counters.failures == 0


def test_one_ended_pod_ends_the_attempt_and_the_next_one_starts_as_a_whole() -> None:
    job = running(started())
    decision = ask(job, seen(job, 0), seen(job, 1, **killed(137)))
    assert ([pod.name for pod in decision.delete], decision.status, decision.create) == (["cats-1-0"], None, ())
    decision = ask(
        job, seen(job, 0, gone=True, **stopped(asked=1)), seen(job, 1, gone=True, metadata=deleting(asked=-9))
    )
    assert [item["metadata"]["name"] for item in decision.create] == ["cats", "cats-2-0", "cats-2-1"]


@pytest.mark.parametrize("how", ["suspended", "one ended"])
def test_a_pod_that_goes_while_the_attempt_is_stopped_is_not_created_again(how: str) -> None:
    """It had no node, so its deletion leaves nothing behind; an operator that starts anew must not miss it."""
    job = started()
    if how == "suspended":
        job["spec"]["suspend"] = True
        first = seen(job, 0)
    else:
        first = seen(job, 0, **killed(1))
    decision = ask(job, first, SeenPod(make_pod(job, rank=1)))
    assert "cats-1-1" in {pod.name for pod in decision.delete}
    assert decision.status is not None
    job = {**job, "status": to_object(decision.status)}
    job["spec"]["suspend"] = False
    assert not {"cats-1-0", "cats-1-1"} & {item["metadata"]["name"] for item in ask(job, first).create}


def test_a_pod_that_is_done_waits_for_the_others() -> None:
    """They are writing their last words; to stop them would cost another attempt."""
    job = running(started())
    decision = ask(job, seen(job, 0), seen(job, 1, **failed(0)))
    assert (decision.delete, decision.create, decision.status) == ((), (), None)
