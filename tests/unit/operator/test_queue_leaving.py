"""A place in a queue that nobody needs is given back; what Kueue is asked, and what it is told."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import ClassVar

import pytest

from diffusion_api import names
from diffusion_api.outcomes import Cause
from diffusion_operator.errors import RefusedError
from diffusion_operator.knowledge import QUEUE_SECONDS, Knowledge
from diffusion_operator.policies import queueing
from diffusion_operator.state import SeenPod
from testkit.builders import NOW, Object, deleting, last_word, merge, terminated
from testkit.deciding import after, ask
from testkit.fakes import MemoryCluster
from testkit.queueing import admitted, evicted, queued_job, waiting
from testkit.simulation import Simulation


class TestLeaving:
    """A place that nobody needs is given back, once all pods have ended, and never sooner."""

    FAILED: ClassVar[Object] = {"status": {"phase": "Failed"} | terminated(64, message=last_word(64))}

    def test_a_failed_job_says_that_no_pod_will_follow(self) -> None:
        job, pod = admitted()
        failed = merge(pod, self.FAILED)
        decision = ask(job, failed)
        assert decision.status is not None
        assert decision.status.phase == "Failed"
        assert [mark.pod.name for mark in decision.mark] == ["cats-1-0"]
        job = after(job, decision)
        # Said once. A crash before it was said is made up for by the next look.
        assert [mark.pod.name for mark in ask(job, failed).mark] == ["cats-1-0"]
        told = merge(failed, {"metadata": {"annotations": {names.ANNOTATION_RETRIABLE: "false"}}})
        assert ask(job, told).mark == ()
        assert ask(job, merge(failed, {"metadata": {"finalizers": None}})).mark == ()

    def test_a_complete_job_leaves_by_itself(self) -> None:
        job, pod = admitted()
        decision = ask(job, merge(pod, {"status": {"phase": "Succeeded"} | terminated(0, message=last_word(0))}))
        assert decision.status is not None
        assert (decision.status.phase, decision.mark, decision.leave) == ("Complete", (), ())

    def test_a_complete_job_whose_pod_was_killed_at_the_end_does_not(self) -> None:
        job, pod = admitted()
        decision = ask(job, merge(pod, {"status": {"phase": "Failed"} | terminated(137, message=last_word(0))}))
        assert decision.status is not None
        assert (decision.status.phase, len(decision.mark)) == ("Complete", 1)

    def test_a_suspended_job_that_ran(self) -> None:
        job, pod = admitted(queued_job())
        job = merge(job, {"spec": {"suspend": True}})
        stopping = ask(job, pod)
        assert ([one.name for one in stopping.delete], stopping.mark, stopping.leave) == (["cats-1-0"], (), ())
        decision = ask(after(job, stopping), merge(evicted(pod), {"status": {"conditions": None}}))
        assert decision.status is not None
        assert (decision.status.phase, decision.status.workload) == ("Suspended", None)
        assert len(decision.mark) == 1
        assert decision.status.attempts[0].cause == Cause.SUSPENDED

    def test_a_suspended_job_that_waited(self) -> None:
        job, pod = waiting()
        job = merge(job, {"spec": {"suspend": True}})
        stopping = ask(job, pod)
        assert [one.name for one in stopping.delete] == ["cats-1-0"]
        decision = ask(after(job, stopping), merge(pod, {"metadata": deleting(asked=0, grace=0)}))
        assert decision.status is not None
        assert (decision.status.phase, decision.leave) == ("Suspended", (job["status"]["workload"],))
        again = ask(
            merge(after(job, decision), {"spec": {"suspend": False}}),
            merge(pod, {"metadata": deleting(asked=0, grace=0)}),
        )
        assert again.status is not None
        assert again.status.workload != job["status"]["workload"], "a new place, at the end of the queue"

    def test_a_job_that_is_being_deleted(self) -> None:
        job, pod = admitted()
        job = merge(job, {"metadata": deleting(asked=0, grace=0)})
        assert ask(job, pod).mark == ask(job, merge(pod, {"metadata": deleting(asked=-1)})).mark == ()
        assert len(ask(job, evicted(pod)).mark) == 1

    def test_a_job_of_another_controller_is_left_alone(self) -> None:
        job, pod = admitted()
        job = merge(job, {"spec": {"managedBy": "kueue.x-k8s.io/multikueue", "suspend": True}})
        decision = ask(job, merge(pod, self.FAILED))
        assert (decision.rule, decision.status, decision.mark, decision.leave) == ("managedBy", None, (), ())
        assert decision.delete == decision.create == ()

    def test_not_while_a_pod_of_the_group_lives(self) -> None:
        pods = [SeenPod(admitted()[1]), SeenPod(merge(admitted()[1], self.FAILED))]
        assert queueing.leaving(pods, kept=None, now=NOW) == queueing.Leaving()
        assert queueing.leaving(pods[1:], kept=pods[0].group, now=NOW) == queueing.Leaving()
        assert queueing.leaving(pods[1:], kept=None, now=NOW) != queueing.Leaving()


class TestAJobThatIsGone:
    def left_behind(self, pod: Object, *, heard_of: bool = True) -> Simulation:
        job, _ = admitted()
        simulation = Simulation(job)
        simulation.cluster.workloads = [{"metadata": {"namespace": "team-a", "name": job["status"]["workload"]}}]
        simulation.cluster.pods["team-a", "cats-1-0"] = pod
        simulation.read()
        if heard_of:
            del simulation.cluster.jobs["team-a", "cats"]
            simulation.read()
        else:
            (known,) = simulation.knowledge.jobs
            simulation.knowledge.jobs.remove(known)
        return simulation

    def test_its_ended_pods_are_let_go(self) -> None:
        _, pod = admitted()
        simulation = self.left_behind(evicted(pod))
        asyncio.run(simulation.reconciler.reconcile(simulation.uid))
        assert simulation.cluster.writes == ["patch cats-1-0"]

    def test_its_place_is_given_back_where_no_pod_ran(self) -> None:
        _, pod = waiting()
        simulation = self.left_behind(merge(pod, {"metadata": deleting(asked=0, grace=0)}))
        for _ in range(2):  # the second time it is gone already
            asyncio.run(simulation.reconciler.reconcile(simulation.uid))
        assert simulation.cluster.workloads == []

    def test_its_running_pods_are_waited_for(self) -> None:
        _, pod = admitted()
        simulation = self.left_behind(pod)
        asyncio.run(simulation.reconciler.reconcile(simulation.uid))
        assert simulation.cluster.writes == []

    def test_one_that_was_only_not_heard_of_yet_loses_nothing(self) -> None:
        _, pod = admitted()
        simulation = self.left_behind(evicted(pod), heard_of=False)
        asyncio.run(simulation.reconciler.reconcile(simulation.uid))
        assert simulation.cluster.writes == []
        assert len(simulation.knowledge.jobs) == 1


class TestAsking:
    def test_kueue_is_asked_for_pods_that_it_holds_back_and_not_too_often(self) -> None:
        cluster, knowledge, asked = MemoryCluster(workloads=[]), Knowledge(), 0
        listing = cluster.list_workloads

        async def counted(namespace: str) -> tuple[Object, ...] | None:
            nonlocal asked
            asked += 1
            return await listing(namespace)

        cluster.list_workloads = counted  # type: ignore[method-assign]
        for seconds in range(4 * QUEUE_SECONDS):
            now = NOW + timedelta(seconds=seconds)
            assert asyncio.run(knowledge.workloads(cluster, "team-a", now=now)) == ()
        assert asked == 4
        job, pod = admitted()
        simulation = Simulation(job)
        simulation.cluster.list_workloads = counted  # type: ignore[method-assign]
        simulation.cluster.pods["team-a", "cats-1-0"] = pod
        simulation.look()
        assert asked == 4

    def test_a_right_that_was_not_given_is_an_error_that_says_so(self) -> None:
        job, pod = admitted()
        simulation = Simulation(job)
        simulation.cluster.pods["team-a", "cats-1-0"] = merge(pod, TestLeaving.FAILED)
        simulation.read()
        asyncio.run(simulation.reconciler.reconcile(simulation.uid))
        simulation.cluster.pods["team-a", "cats-1-0"]["metadata"]["annotations"].pop(names.ANNOTATION_RETRIABLE)
        simulation.restart()
        simulation.cluster.errors = [RefusedError("PATCH pods: 403")]
        with pytest.raises(RefusedError, match="403"):
            asyncio.run(simulation.reconciler.reconcile(simulation.uid))
