"""Jobs in queues of a real Kueue: places, evictions, retries, and quota that is given back. The test plays kubelet."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from diffusion_api import names
from diffusion_operator import timestamps
from testkit import kueue
from testkit.builders import last_word, make_checkpoint, make_job
from testkit.kube import Object, condition
from testkit.operating import JOBS, Installation, Kubelet, OperatorProcess, User, installed
from testkit.waiting import wait_until

pytestmark = pytest.mark.apiserver

PLENTY = {"cpu": "1000", "memory": "1000Gi", "ephemeral-storage": "10000Gi"}
"""Kueue admits no pod that requests a resource for which there is no quota."""


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("queues")) as found, kueue.KueueManager(found.kube):
        for name, value in (("low", 10), ("high", 1000)):
            found.kube.apply(kueue.priority_class(name, value=value))
        yield found


class Room:
    """A namespace with a queue `main` for so many GPUs."""

    def __init__(self, installation: Installation, namespace: str, operator: OperatorProcess) -> None:
        self.kube = installation.kube
        self.operator = operator
        self.namespace = namespace
        self.user = User(self.kube, namespace)
        self.kubelet = Kubelet(self.kube, namespace)

    def offer(self, gpus: int) -> None:
        name = self.namespace
        quota = {"nvidia.com/gpu": gpus, **PLENTY}
        self.kube.apply(kueue.resource_flavor(name), kueue.cluster_queue(name, flavor=name, quota=quota))
        self.kube.apply(kueue.local_queue("main", cluster_queue=name), namespace=name)

    def submit(self, name: str, *, queue: str = "main", priority: str = "low", **spec: Any) -> None:
        job = make_job(name=name, **spec)
        labels = {names.LABEL_QUEUE: queue, names.LABEL_QUEUE_PRIORITY: priority}
        self.kube.api.create(JOBS, {**job, "metadata": {"name": name, "labels": labels}}, namespace=self.namespace)

    def pod(self, name: str) -> Object:
        return self.kube.get("pods", name, namespace=self.namespace)

    def runs(self, *pods: str) -> None:
        """Wait until Kueue lets the pods go, and run them."""
        for name in pods:
            self.kube.wait_for("pods", name, lambda pod: "schedulingGates" not in pod["spec"], namespace=self.namespace)
            self.kubelet.run(name)

    def obeys(self, *pods: str, code: int = 75, **word: Any) -> None:
        """Wait until the pods are told to stop, and stop them as their kubelet would."""
        for name in pods:
            self.kube.wait_for(
                "pods", name, lambda pod: "deletionTimestamp" in pod["metadata"], namespace=self.namespace
            )
            self.kubelet.end(name, code, message=last_word(code, attempt=int(name.split("-")[-2]), **word))
            self.kubelet.remove(name)

    def completes(self, pod: str) -> None:
        self.kubelet.end(pod, 0, message=last_word(0, attempt=int(pod.split("-")[-2])))

    def gone(self, *pods: str) -> None:
        for name in pods:
            self.kube.wait_gone("pods", name, namespace=self.namespace)

    def job(self, name: str) -> Object:
        return self.user.job(name)

    def queued(self, name: str, *, attempt: int = 1, cause: str = "WaitingForQuota") -> Object:
        """Wait until the job waits in its queue for that reason; return its status."""

        def waits(job: Object) -> bool:
            status = job.get("status", {})
            why = (status.get("pending") or {}).get("cause")
            return (status.get("phase"), status.get("attempt"), why) == ("Queued", attempt, cause)

        found = self.kube.wait_for(JOBS, name, waits, namespace=self.namespace, describe=f"{cause}")
        status: Object = found["status"]
        return status

    def workload(self, name: str) -> Object:
        """Return the Workload that the job's status names."""
        return self.kube.get("workloads", self.job(name)["status"]["workload"], namespace=self.namespace)

    def ages(self, name: str) -> None:
        """Wait until whatever is made from now on is younger than the job's Workload: Kueue counts whole seconds."""
        made = timestamps.from_text(self.workload(name)["metadata"]["creationTimestamp"])
        wait_until(lambda: datetime.now(UTC) >= made + timedelta(seconds=1), describe="the next second")

    def left(self, workload: Object) -> None:
        """Wait until the Workload has given its quota back."""
        name, uid = workload["metadata"]["name"], workload["metadata"]["uid"]

        def over() -> bool:
            found = self.kube.find("workloads", name, namespace=self.namespace)
            return found is None or found["metadata"]["uid"] != uid or bool(condition(found, "Finished"))

        wait_until(over, describe=f"the end of workload {name}")


@pytest.fixture
def room(installation: Installation, request: pytest.FixtureRequest) -> Iterator[Room]:
    with installation.kube.namespace(request.node.originalname) as namespace:
        with OperatorProcess(installation, namespace=namespace) as operator:
            yield Room(installation, namespace, operator)
        for kind in ("clusterqueues", "resourceflavors"):
            installation.kube.api.delete(kind, namespace)


def failures(status: Object) -> int:
    return int(status["counters"].get("failures", 0))


def test_who_waits_says_so_and_who_is_evicted_comes_back_in_its_place(room: Room) -> None:
    room.offer(1)
    room.submit("first")
    room.runs("first-1-0")
    room.user.wait_phase("Preparing", "first")
    room.ages("first")
    room.submit("second")
    waits = room.queued("second")
    assert waits["pending"]["detail"].startswith("place 1 in the queue; queue main: couldn't assign flavors")
    assert "insufficient unused quota for nvidia.com/gpu" in waits["pending"]["detail"]
    assert condition(room.job("second"), "Admitted")["status"] == "False"
    assert condition(room.job("first"), "Admitted")["status"] == "True"
    place = room.workload("first")["metadata"]["uid"]
    room.submit("urgent", priority="high")
    room.obeys("first-1-0", latest_checkpoint=make_checkpoint(40))
    room.runs("urgent-1-0")
    evicted = room.queued("first", attempt=2)
    assert evicted["attempts"][1]["cause"] == "Preempted"
    assert evicted["checkpoint"]["latest"]["step"] == 40
    for name, place_now in (("first", "place 1 "), ("second", "place 2 ")):
        detail = lambda name=name: room.job(name)["status"]["pending"]["detail"]  # noqa: E731
        wait_until(lambda: detail().startswith(place_now), describe=f"{place_now}of {name}", detail=detail)  # noqa: B023
    room.completes("urgent-1-0")
    room.runs("first-2-0")
    assert room.workload("first")["metadata"]["uid"] == place
    room.completes("first-2-0")
    status = room.user.wait_phase("Complete", "first")
    assert (failures(status), status["counters"]["preemptions"]) == (0, 1)
    room.runs("second-1-0")


def test_suspended_jobs_leave_the_queue_and_resume_at_its_end(room: Room) -> None:
    room.offer(1)
    room.submit("works")
    room.runs("works-1-0")
    room.submit("waits")
    room.queued("waits")
    left = [room.workload(name) for name in ("works", "waits")]
    room.user.change("waits", suspend=True)
    room.user.wait_phase("Suspended", "waits")
    room.gone("waits-1-0")
    room.submit("behind")
    room.queued("behind")
    room.user.change("works", suspend=True)
    room.obeys("works-1-0")
    status = room.user.wait_phase("Suspended", "works")
    assert (status["attempts"][0]["cause"], "workload" in status) == ("Suspended", False)
    for workload in left:
        room.left(workload)
    room.runs("behind-1-0")
    room.user.change("works", suspend=False)
    assert failures(room.queued("works", attempt=2)) == 0
    room.completes("behind-1-0")
    room.runs("works-2-0")


def test_a_failed_job_gives_its_quota_back_and_its_pod_can_be_read(room: Room) -> None:
    room.offer(1)
    room.submit("broken")
    room.runs("broken-1-0")
    room.submit("behind")
    room.queued("behind")
    room.kubelet.end("broken-1-0", 64, message=last_word(64))
    assert room.user.wait_phase("Failed", "broken")["attempts"][0]["cause"] == "BadConfig"
    room.runs("behind-1-0")
    pod = room.pod("broken-1-0")
    assert ("finalizers" in pod["metadata"], "deletionTimestamp" in pod["metadata"]) == (False, False)


def test_a_retry_keeps_the_quota_and_deletion_gives_it_back_though_the_operator_was_down(
    room: Room, installation: Installation
) -> None:
    room.offer(1)
    room.submit("flaky")
    room.runs("flaky-1-0")
    room.submit("behind")
    room.queued("behind")
    place = room.workload("flaky")
    room.kubelet.end("flaky-1-0", 80, message=last_word(80))  # too large a micro-batch: again at once
    room.runs("flaky-2-0")
    assert room.workload("flaky")["metadata"]["uid"] == place["metadata"]["uid"]
    assert room.job("behind")["status"]["phase"] == "Queued"
    room.operator.kill()
    room.kube.api.delete(JOBS, "flaky", namespace=room.namespace)
    room.kube.api.delete("pods", "flaky-2-0", namespace=room.namespace)  # as the garbage collector does
    room.obeys("flaky-2-0")
    with OperatorProcess(installation, namespace=room.namespace):
        room.left(place)
        room.gone("flaky-2-0")
        room.runs("behind-1-0")


def test_a_mistyped_queue_is_named_and_corrected_in_place(room: Room) -> None:
    room.offer(1)
    room.submit("typo", queue="mian")
    status = room.queued("typo", cause="QueueMissing")
    assert "LocalQueue mian doesn't exist" in status["pending"]["detail"]
    assert names.LABEL_QUEUE in status["pending"]["hint"]
    change = {"metadata": {"labels": {names.LABEL_QUEUE: "main"}}}
    room.kube.api.patch(JOBS, "typo", change, namespace=room.namespace)
    room.runs("typo-1-0")
    assert room.user.wait_phase("Preparing", "typo")["attempt"] == 1


def test_pods_of_several_nodes_start_together_and_a_rank_that_succeeded_needs_a_new_group(room: Room) -> None:
    room.offer(2)
    room.submit("one")
    room.runs("one-1-0")
    room.submit("pair", resources={"nodes": 2})
    room.queued("pair")
    assert all("schedulingGates" in room.pod(f"pair-1-{rank}")["spec"] for rank in (0, 1)), "half of it has room"
    room.completes("one-1-0")
    room.runs("pair-1-0", "pair-1-1")
    place = room.workload("pair")
    room.kubelet.end("pair-1-0", 80, message=last_word(80))
    room.obeys("pair-1-1")
    room.runs("pair-2-0", "pair-2-1")
    assert room.workload("pair")["metadata"]["uid"] == place["metadata"]["uid"]
    room.kubelet.end("pair-2-0", 0, message=last_word(0, attempt=2))
    room.kubelet.end("pair-2-1", 75, message=last_word(75, attempt=2))
    room.left(place)
    room.runs("pair-3-0", "pair-3-1")
    assert room.workload("pair")["metadata"]["name"] != place["metadata"]["name"]
