"""Jobs in a queue of Kueue: one group over all attempts, free evictions, and places that are given back."""

from __future__ import annotations

import pytest

from diffusion_api import names
from diffusion_api.outcomes import Cause
from diffusion_operator.desired import pod_group
from diffusion_operator.policies import queueing
from diffusion_operator.policies.waiting.queued import EXACT_PLACES
from testkit.builders import at, deleting, last_word, make_job, make_profile, merge, terminated
from testkit.deciding import after, ask, condition
from testkit.queueing import (
    EVICTED,
    PRIORITY,
    QUEUE,
    Object,
    admitted,
    as_kueue_shows,
    evicted,
    queued_job,
    waiting,
    workload,
)


class TestTheGroup:
    def test_a_single_pod_is_one_too(self) -> None:
        decision = ask(queued_job(priority="high"))
        assert decision.status is not None
        metadata = decision.create[0]["metadata"]
        group = f"cats-{make_job()['metadata']['uid'][:8]}-1"
        assert decision.status.workload == group
        kueue = {key: value for key, value in metadata["labels"].items() if key.startswith(names.KUEUE_PREFIX)}
        assert kueue == {QUEUE: "main", PRIORITY: "high", names.LABEL_POD_GROUP: group}
        assert metadata["annotations"][names.ANNOTATION_POD_GROUP_COUNT] == "1"
        assert names.ANNOTATION_RETRIABLE not in metadata["annotations"]

    def test_without_a_queue_nothing_is_said_to_kueue(self) -> None:
        decision = ask(make_job())
        assert decision.status is not None
        assert decision.status.workload is None
        assert names.KUEUE_PREFIX not in str(decision.create)

    def test_a_priority_alone_asks_for_no_queue(self) -> None:
        assert names.LABEL_POD_GROUP not in str(ask(make_job(metadata={"labels": {PRIORITY: "high"}})).create)

    def test_the_label_of_the_job_goes_before_that_of_pod_overrides(self) -> None:
        for labels, queue in (({}, "theirs"), ({QUEUE: "main"}, "main")):
            job = make_job(metadata={"labels": labels}, podOverrides={"labels": {QUEUE: "theirs"}})
            assert ask(job).create[0]["metadata"]["labels"][QUEUE] == queue
            assert ask(job).create[0]["metadata"]["labels"][names.LABEL_POD_GROUP]

    def test_all_ranks_have_the_same_count_and_role(self) -> None:
        pods = [pod for pod in ask(queued_job(resources={"nodes": 4})).create if pod["kind"] == "Pod"]
        marks = [pod["metadata"]["annotations"] for pod in pods]
        assert [mark[names.ANNOTATION_POD_GROUP_COUNT] for mark in marks] == ["4"] * 4
        assert len({mark[names.ANNOTATION_POD_GROUP_ROLE] for mark in marks}) == 1

    def test_the_role_is_that_of_the_kind_of_node_and_not_of_single_ones(self) -> None:
        def role(job: Object, profile: Object | None = None) -> str:
            return pod_group.role(ask(job, profile=profile or make_profile()).create[-1])

        excluded = {"node": "n1", "until": at(600), "reason": "GPUFault"}
        assert role(make_job(status={"excludedNodes": [excluded]})) == role(make_job())
        others = [
            role(make_job(resources={"gpusPerNode": 2})),
            role(make_job(podOverrides={"nodeSelector": {"zone": "a"}})),
            role(make_job(podOverrides={"tolerations": [{"key": "k", "operator": "Exists"}]})),
            role(make_job(), make_profile(nodeAffinity=[{"key": "product", "values": ["H100"]}])),
            role(make_job(), make_profile(perGpu={"memory": "128Gi"})),
        ]
        assert len({role(make_job()), *others}) == 6

    @pytest.mark.parametrize("attempt", [1, 10**9])
    def test_its_name_is_a_label_whatever_the_job_is_called(self, attempt: int) -> None:
        assert len(names.workload_name("j" * names.MAX_JOB_NAME, make_job()["metadata"]["uid"], attempt)) <= 63

    def test_a_preflight_is_in_no_queue_and_no_gang(self) -> None:
        marks = {"scheduling.k8s.io/group-name": "g", "volcano.sh/queue-name": "q", "mine": "kept"}
        labels = {"scheduling.x-k8s.io/pod-group": "g", "kai.scheduler/queue": "q", QUEUE: "main", "mine": "kept"}
        job = queued_job(podOverrides={"labels": labels, "annotations": marks, "schedulerName": "volcano"})
        (pod,) = ask(job, preflight=True).create
        assert pod["metadata"]["name"] == "cats-preflight"
        for given in (pod["metadata"]["labels"], pod["metadata"]["annotations"]):
            assert given["mine"] == "kept"
            assert not [key for key in given if key.startswith(pod_group.SCHEDULERS)]
        assert "schedulerName" not in pod["spec"]


class TestWaiting:
    def test_the_job_is_queued_and_says_why_and_in_which_place(self) -> None:
        job, pod = waiting()
        mine = workload(job["status"]["workload"], age=10)
        other = workload("other", age=20)
        decision = ask(job, pod, workloads=(mine, other))
        assert decision.status is not None
        assert decision.status.phase == "Queued"
        assert decision.status.pending is not None
        assert decision.status.pending.cause == "WaitingForQuota"
        assert decision.status.pending.detail.startswith("place 2 in the queue; queue main: couldn't assign flavors")
        assert condition(decision, "Admitted") == ("False", "Queued")
        assert decision.again_seconds == pytest.approx(queueing.LOOK_AGAIN_SECONDS + 0.2)

    def test_kueue_is_given_a_moment_before_silence_is_a_cause(self) -> None:
        job, pod = waiting()
        for age, cause in ((1, None), (60, "Gated")):
            young = merge(pod, {"metadata": {"creationTimestamp": at(-age)}})
            decision = ask(job, young, workloads=())
            assert decision.status is not None
            assert (decision.status.phase, decision.again_seconds) == ("Queued", queueing.JUDGING_SECONDS)
            assert (decision.status.pending and decision.status.pending.cause) == cause

    def test_without_the_right_to_read_workloads_it_still_waits_in_its_queue(self) -> None:
        job, pod = waiting()
        decision = ask(job, pod, workloads=None)
        assert decision.status is not None
        assert decision.status.phase == "Queued"
        assert decision.status.pending is not None
        assert names.LABEL_QUEUE_PRIORITY in decision.status.pending.hint

    def test_places_follow_priority_and_age_within_one_queue(self) -> None:
        job, pod = waiting()
        mine = workload(job["status"]["workload"], age=10, uid="b")
        line = (
            mine,
            workload("younger", age=5),
            workload("twin", age=10, uid="a"),
            workload("important", age=1, priority=5),
            workload("elsewhere", age=99, queue="other"),
            workload("works", age=99, reserved="True"),
            workload("stopped", age=99, active=False),
        )
        decision = ask(job, pod, workloads=line)
        assert decision.status is not None
        assert decision.status.pending is not None
        assert decision.status.pending.detail.startswith("place 3 in the queue; ")

    def test_far_places_are_told_roughly(self) -> None:
        job, pod = waiting()
        mine = workload(job["status"]["workload"], age=10)
        details = set()
        for before in range(30, 40):
            others = tuple(workload(f"w{number}", age=20) for number in range(before))
            decision = ask(job, pod, workloads=(mine, *others))
            assert decision.status is not None
            assert decision.status.pending is not None
            details.add(decision.status.pending.detail.split(";")[0])
        assert details == {"more than 30 are before it in the queue"}
        assert EXACT_PLACES == 10

    def test_running_it_is_admitted(self) -> None:
        job, pod = admitted()
        assert condition(ask(job, pod), "Admitted") == ("True", "Admitted")

    def test_a_changed_label_reaches_the_pods_that_wait_and_no_others(self) -> None:
        job, pod = waiting()
        changed = merge(job, {"metadata": {"labels": {QUEUE: "other", PRIORITY: "high"}}})
        (mark,) = ask(changed, pod).mark
        assert mark.metadata == {"labels": {QUEUE: "other", PRIORITY: "high"}}
        assert ask(job, pod).mark == ()
        job, pod = admitted()
        assert ask(merge(job, {"metadata": {"labels": {QUEUE: "other"}}}), pod).mark == ()


class TestEviction:
    def test_it_is_a_preemption_and_the_replacement_waits_in_the_same_place(self) -> None:
        job, pod = admitted()
        decision = ask(job, evicted(pod))
        assert decision.status is not None
        ended = decision.status.attempts[1]
        assert (ended.cause, decision.status.counters.failures, decision.status.counters.preemptions) == (
            Cause.PREEMPTED,
            0,
            1,
        )
        assert decision.status.workload == job["status"]["workload"]
        (new,) = decision.create
        assert new["metadata"]["labels"][names.LABEL_POD_GROUP] == job["status"]["workload"]
        assert new["metadata"]["name"] == "cats-2-0"
        assert (decision.mark, decision.leave) == ((), ())

    def test_it_is_waited_for_until_the_pod_has_saved(self) -> None:
        job, pod = admitted()
        stopping = merge(pod, {"metadata": deleting(asked=-5), "status": EVICTED})
        decision = ask(job, stopping)
        assert decision.status is not None
        assert (decision.status.phase, decision.create, decision.mark, decision.leave) == ("Interrupted", (), (), ())

    @pytest.mark.parametrize(
        ("reason", "cause"),
        [
            ("WorkloadEvictedDueToPreempted", Cause.PREEMPTED),
            ("WorkloadEvictedDueToDeactivatedDueToRequeuingLimitExceeded", Cause.PREEMPTED),
            ("WorkloadEvictedDueToNodeFailures", Cause.NODE_LOST),
            ("WorkloadDeleted", Cause.PREEMPTED),
            ("NotAdmitted", Cause.PREEMPTED),
        ],
    )
    def test_its_reason_is_told_also_of_a_pod_that_was_killed(self, reason: str, cause: Cause) -> None:
        job, pod = admitted()
        killed = merge(evicted(pod), {"status": terminated(137, reason="OOMKilled", finished=0)})
        killed["status"]["conditions"][0]["reason"] = reason
        decision = ask(job, killed)
        assert decision.status is not None
        ended = decision.status.attempts[1]
        assert ended.cause == cause
        assert f"{reason}: Preempted to accommodate a workload" in ended.message

    def test_a_pod_that_had_crashed_before_did_crash(self) -> None:
        job, pod = admitted()
        crashed = merge(evicted(pod), {"status": terminated(1, finished=-50)})
        decision = ask(job, crashed)
        assert decision.status is not None
        assert decision.status.attempts[0].cause == Cause.CRASH

    def test_a_pod_that_was_deleted_while_it_waited_is_replaced(self) -> None:
        job, pod = waiting()
        decision = ask(job, merge(pod, {"metadata": deleting(asked=-3600, grace=0)}))
        assert decision.status is not None
        assert (decision.status.attempts[1].cause, decision.status.counters.failures) == (Cause.PREEMPTED, 0)
        assert decision.create[0]["metadata"]["labels"][names.LABEL_POD_GROUP] == job["status"]["workload"]


class TestANewGroup:
    """Where new pods cannot stand for the old ones, another place is taken, and the old one is given back."""

    def test_for_a_rank_that_succeeded(self) -> None:
        job = queued_job(resources={"nodes": 2})
        decision = ask(job)
        job = after(job, decision)
        made = [pod for pod in decision.create if pod["kind"] == "Pod"]
        pods = [
            merge(as_kueue_shows(pod), {"spec": {"nodeName": f"n{rank}"}, "status": {"phase": phase} | word})
            for rank, (pod, phase, word) in enumerate(
                zip(
                    made,
                    ("Succeeded", "Failed"),
                    (terminated(0, message=last_word(0)), terminated(75, message=last_word(75))),
                    strict=True,
                )
            )
        ]
        decision = ask(job, *pods)
        assert decision.status is not None
        assert decision.status.workload == f"{job['status']['workload'][:-1]}2"
        ((mark),) = decision.mark
        assert mark.metadata == {"annotations": {names.ANNOTATION_RETRIABLE: "false"}}
        assert decision.leave == ()

    def test_for_a_pod_on_a_node_that_stopped_answering(self) -> None:
        job, pod = admitted()
        decision = ask(job, merge(pod, {"metadata": deleting(asked=-500)}))
        assert decision.status is not None
        assert decision.status.attempts[1].cause == Cause.NODE_LOST
        assert decision.status.workload != job["status"]["workload"]
        assert decision.leave == (job["status"]["workload"],)

    def test_for_another_queue_and_for_none(self) -> None:
        job, pod = admitted()
        for queue, group in (("other", f"{job['status']['workload'][:-1]}2"), (None, None)):
            decision = ask(merge(job, {"metadata": {"labels": {QUEUE: queue}}}), evicted(pod))
            assert decision.status is not None
            assert decision.status.workload == group
            assert [mark.pod.name for mark in decision.mark] == ["cats-1-0"]

    def test_for_other_requests(self) -> None:
        job, pod = admitted()
        pod = merge(pod, {"metadata": {"annotations": {names.ANNOTATION_POD_GROUP_ROLE: "rank-ffffffff"}}})
        decision = ask(job, evicted(pod))
        assert decision.status is not None
        assert decision.status.workload != job["status"]["workload"]
