"""How a real Kueue treats bare pods: the facts that the operator's policies for queues are written against.

docs/reference/kueue.md tells them as rules for the operator; each sentence there is a test here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testkit import kueue
from testkit.cluster import ClusterHandle
from testkit.kube import ApiError, Object, condition
from testkit.pods import pod
from testkit.waiting import wait_until

# What the operator makes of these facts is tested with the same Kueue in integration/test_queues.py.
pytestmark = pytest.mark.nightly

GROUP = "kueue.x-k8s.io"
QUEUE = f"{GROUP}/queue-name"
FINALIZER = f"{GROUP}/managed"
GATE = {"name": f"{GROUP}/admission"}
ROLE = f"{GROUP}/role-hash"
RETRIABLE = f"{GROUP}/retriable-in-group"
EXEMPT = "testkit-exempt"
GPUS = 2
END = "import sys; sys.exit({code})"
UNTIL_TERM = (
    "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print('ready', flush=True); "
    "signal.sigwait([signal.SIGTERM]); sys.exit({code})"
)
SLEEP = UNTIL_TERM.format(code=75)


@pytest.fixture(scope="module")
def image(shared_cluster: ClusterHandle) -> Iterator[str]:
    """Kueue on the cluster, with two priorities; and an image that runs the Python program in its argument."""
    with kueue.installed(shared_cluster, exempt=[EXEMPT]):
        for name, value in (("low", 10), ("high", 1000)):
            shared_cluster.apply(kueue.priority_class(name, value=value))
        yield shared_cluster.load_image("testkit/python:1", entrypoint=["python", "-c"])
    left = [f"{kind}/{name}" for kind, name in remains(shared_cluster)]
    assert not left, f"Kueue was removed, but there are {', '.join(left)}"


def remains(cluster: ClusterHandle) -> Iterator[tuple[str, str]]:
    for kind in ("customresourcedefinitions", "mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
        for found in cluster.items(kind):
            name = found["metadata"]["name"]
            if name.startswith("kueue-") or name.endswith(f".{GROUP}"):
                yield kind, name


class Room:
    """A namespace with a queue `main` that has a quota of GPUS."""

    def __init__(self, cluster: ClusterHandle, namespace: str, image: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._image = image

    def add(self, name: str, *, group: str = "", gpus: int = 1, runs: str = SLEEP, priority: str = "", **spec) -> None:
        """Make a pod of the queue; one of `total` (2) where it has a group. `role` presets its role in the group."""
        role, total, requests = spec.pop("role", ""), spec.pop("total", 2), spec.pop("requests", {})
        made = pod(name, image=self._image, args=[runs], gpus=gpus, labels={QUEUE: "main"}, **spec)
        made["spec"]["containers"][0]["resources"]["requests"] = requests
        marks = {ROLE: role} if role else {}
        if priority:
            made["metadata"]["labels"][f"{GROUP}/priority-class"] = priority
        if group:
            made["metadata"]["labels"][f"{GROUP}/pod-group-name"] = group
            marks[f"{GROUP}/pod-group-total-count"] = str(total)
        made["metadata"]["annotations"] = marks
        self.cluster.api.create("pods", made, namespace=self.namespace)

    def change(self, *, clusterQueue: str | None = "", localQueue: str = "", stopPolicy: str = "", **flavor) -> None:  # noqa: N803
        """Spoil the room: another ClusterQueue of the queue (None: no queue), a stop, fields of the flavor."""
        api, name = self.cluster.api, self.namespace
        if clusterQueue is None or clusterQueue:
            api.delete("localqueues", "main", namespace=name)
            self.cluster.wait_gone("localqueues", "main", namespace=name)
        if clusterQueue:
            self.cluster.apply(kueue.local_queue("main", cluster_queue=clusterQueue), namespace=name)
        if localQueue:
            api.patch("localqueues", "main", {"spec": {"stopPolicy": localQueue}}, namespace=name)
        if stopPolicy:
            api.patch("clusterqueues", name, {"spec": {"stopPolicy": stopPolicy}})
            stopped = lambda queue: condition(queue, "Active").get("status") == "False"  # noqa: E731
            self.cluster.wait_for("clusterqueues", name, stopped)
        if flavor:
            api.patch("resourceflavors", name, {"spec": flavor})

    def add_pair(self, attempt: int, *, runs: tuple[str, str] = (SLEEP, SLEEP), **more) -> list[str]:
        """Make both pods of the group `job`; return their names."""
        names = [f"job-{attempt}-{rank}" for rank in (0, 1)]
        for name, program in zip(names, runs, strict=True):
            self.add(name, group="job", runs=program, **more)
        return names

    def wait(self, phase: str, *names: str) -> list[Object]:
        found = [self.cluster.wait_phase(name, phase, namespace=self.namespace) for name in names]
        for name in names if phase == "Running" else []:
            # Before it is ready a pod does not hear that it is to stop, and is killed at the end of its grace.
            self.cluster.wait_log(name, "ready", namespace=self.namespace)
        return found

    def delete(self, *names: str) -> None:
        for name in names:
            self.cluster.api.delete("pods", name, namespace=self.namespace)

    def gone(self, *names: str) -> None:
        for name in names:
            self.cluster.wait_gone("pods", name, namespace=self.namespace)

    def pod(self, name: str) -> Object:
        return self.cluster.get("pods", name, namespace=self.namespace)

    def workload(self, until=lambda _: True, *, of: str = "") -> Object:
        """Wait for the Workload of the group `job`, or of the single pod `of`, to be so."""
        name = "job"
        if of:
            mine = lambda: [w for w in self._workloads() if w["metadata"]["name"].startswith(f"pod-{of}-")]  # noqa: E731
            name = wait_until(mine, describe=f"a Workload of pod {of}")[0]["metadata"]["name"]
        return self.cluster.wait_for("workloads", name, until, namespace=self.namespace)

    def _workloads(self) -> list[Object]:
        return self.cluster.items("workloads", namespace=self.namespace)

    def after_kueue_looked(self, name: str) -> None:
        """Wait until Kueue has dealt with a pod that is made now, and so with what happened before it."""
        self.add(name, runs="pass")
        self.workload(of=name)

    def annotate(self, name: str, key: str, value: str) -> None:
        self.cluster.api.patch("pods", name, {"metadata": {"annotations": {key: value}}}, namespace=self.namespace)


@pytest.fixture
def room(cluster: ClusterHandle, namespace: str, image: str) -> Iterator[Room]:
    name = namespace
    cluster.apply(kueue.resource_flavor(name), kueue.cluster_queue(name, flavor=name, quota={"nvidia.com/gpu": GPUS}))
    cluster.apply(kueue.local_queue("main", cluster_queue=name), namespace=namespace)
    yield Room(cluster, namespace, image)
    # They go when their last workload has gone, with the namespace.
    cluster.api.delete("clusterqueues", name)
    cluster.api.delete("resourceflavors", name)


def waits_for_replacements(workload: Object) -> bool:
    return condition(workload, "WaitingForReplacementPods").get("status") == "True"


def gated(found: Object) -> bool:
    return GATE in found["spec"].get("schedulingGates", [])


def test_a_pod_is_held_back_until_there_is_quota(room: Room):
    room.add("first", gpus=GPUS)
    (running,) = room.wait("Running", "first")
    assert FINALIZER in running["metadata"]["finalizers"]
    assert running["metadata"]["labels"][FINALIZER] == "true"
    room.add("second")
    found = room.workload(kueue.waiting, of="second")
    reserved = condition(found, "QuotaReserved")
    assert (reserved["status"], reserved["reason"]) == ("False", "Pending")
    assert "insufficient unused quota for nvidia.com/gpu" in reserved["message"]
    waiting = room.pod("second")
    assert gated(waiting)
    assert condition(waiting, "PodScheduled")["reason"] == "SchedulingGated"
    room.delete("first")
    room.gone("first")
    room.wait("Running", "second")
    assert kueue.admitted(room.workload(of="second"))


@pytest.mark.parametrize(
    ("queue", "pods", "reason", "message"),
    [
        ({"clusterQueue": None}, {}, "Inadmissible", "LocalQueue main doesn't exist"),
        ({"clusterQueue": "none"}, {}, "Inadmissible", "ClusterQueue none doesn't exist"),
        ({}, {"gpus": 3}, "Pending", "current podset request (3) > maximum capacity (2)"),
        ({}, {"requests": {"cpu": "1"}}, "Pending", "resource cpu unavailable in ClusterQueue"),
        ({"nodeLabels": {"gpu": "a100"}}, {"nodeSelector": {"gpu": "rtx"}}, "Pending", "doesn't match node affinity"),
        ({"nodeTaints": [{"key": "spot", "effect": "NoSchedule"}]}, {}, "Pending", "untolerated taint {spot"),
        ({"stopPolicy": "Hold"}, {}, "Inadmissible", "is inactive"),
    ],
)
def test_the_workload_says_why_it_waits(room: Room, queue, pods, reason, message):
    room.change(**queue)
    room.add("main", **pods)
    found = condition(room.workload(kueue.waiting, of="main"), "QuotaReserved")
    assert (found["reason"], message in found["message"]) == (reason, True), found


def test_nothing_says_that_a_queue_is_held_or_a_priority_class_missing(cluster: ClusterHandle, room: Room):
    room.add("lost", priority="none")
    room.change(localQueue="Hold")
    room.add("held")
    assert "conditions" not in room.workload(of="held").get("status", {})
    # All that is ever said: on the LocalQueue, and nowhere.
    stopped = lambda queue: condition(queue, "Active").get("reason") == "Stopped"  # noqa: E731
    cluster.wait_for("localqueues", "main", stopped, namespace=room.namespace)
    assert cluster.events(namespace=room.namespace, about="lost") == []
    names = [workload["metadata"]["name"] for workload in cluster.items("workloads", namespace=room.namespace)]
    assert not [name for name in names if name.startswith("pod-lost-")]


def test_pods_without_a_queue_and_exempt_namespaces_are_left_alone(cluster: ClusterHandle, room: Room, image: str):
    plain = pod("plain", image=image, args=["pass"])
    cluster.api.create("pods", plain, namespace=room.namespace)
    (ended,) = room.wait("Succeeded", "plain")
    assert "finalizers" not in ended["metadata"]
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": EXEMPT}})
    try:
        made = pod("queued", image=image, labels={QUEUE: "main"})
        path = f"/api/v1/namespaces/{EXEMPT}/pods?dryRun=All"
        # Its service account is made a moment after the namespace.
        cluster.wait_for("serviceaccounts", "default", bool, namespace=EXEMPT)
        assert "schedulingGates" not in cluster.api.request("POST", path, body=made)["spec"]
    finally:
        cluster.api.delete("namespaces", EXEMPT)


def test_a_group_starts_and_ends_as_a_whole(cluster: ClusterHandle, room: Room):
    room.add("job-1-0", group="job", runs="pass")
    event = "Warning ErrWorkloadCompose job-1-0: 'job' group has fewer runnable pods than expected"
    wait_until(lambda: event in cluster.events(namespace=room.namespace), describe=event)
    assert gated(room.pod("job-1-0"))
    assert cluster.find("workloads", "job", namespace=room.namespace) is None
    room.add("job-1-1", group="job", runs="pass")
    room.wait("Succeeded", "job-1-0", "job-1-1")
    found = room.workload(lambda workload: condition(workload, "Finished"))
    assert condition(found, "Finished")["reason"] == "Succeeded"
    assert condition(found, "Finished")["message"] == "Pods succeeded: 2/2."
    for name in ("job-1-0", "job-1-1"):
        cluster.wait_for("pods", name, lambda it: "finalizers" not in it["metadata"], namespace=room.namespace)


def test_a_group_that_fits_in_part_does_not_start_in_part(room: Room):
    room.add_pair(1, gpus=GPUS)
    found = room.workload(kueue.waiting)
    assert "> maximum capacity (2)" in condition(found, "QuotaReserved")["message"]
    assert all(gated(room.pod(name)) for name in ("job-1-0", "job-1-1"))


def test_an_evicted_group_says_so_and_comes_back_in_its_place(room: Room):
    first = room.add_pair(1, priority="low")
    room.wait("Running", *first)
    room.add("behind", priority="low")
    room.workload(kueue.waiting, of="behind")
    room.add("high", gpus=GPUS, priority="high")
    for found in room.wait("Failed", *first):
        ended = condition(found, "TerminationTarget")
        assert (ended["status"], ended["reason"]) == ("True", "WorkloadEvictedDueToPreempted")
        assert ended["message"].startswith("Preempted to accommodate a workload (UID: ")
        assert condition(found, "DisruptionTarget") == {}
        assert found["metadata"]["deletionTimestamp"]
        assert found["metadata"]["finalizers"] == [FINALIZER]
    workload = room.workload(lambda it: condition(it, "Requeued"))
    assert (condition(workload, "Evicted")["reason"], condition(workload, "Preempted")["reason"]) == (
        "Preempted",
        "InClusterQueue",
    )
    assert waits_for_replacements(workload)
    assert condition(workload, "Admitted")["reason"] == "NoReservation"
    room.wait("Running", "high")
    second = room.add_pair(2, priority="low")
    room.gone(*first)
    assert all(gated(room.pod(name)) for name in second)
    room.workload(lambda it: not waits_for_replacements(it))
    room.delete("high")
    room.wait("Running", *second)
    assert gated(room.pod("behind"))
    assert room.workload()["metadata"]["uid"] == workload["metadata"]["uid"]
    assert not kueue.evicted(room.workload())


def test_a_group_of_one_keeps_its_place_and_a_single_pod_does_not(cluster: ClusterHandle, room: Room):
    room.add("job-1-0", group="job", total=1, priority="low")
    room.add("single", priority="low")
    room.wait("Running", "job-1-0", "single")
    kept, lost = room.workload()["metadata"], room.workload(of="single")["metadata"]
    room.add("high", gpus=GPUS, priority="high")
    (found,) = room.wait("Failed", "job-1-0")
    assert found["metadata"]["finalizers"] == [FINALIZER]
    room.gone("single")
    cluster.wait_gone("workloads", lost["name"], namespace=room.namespace)
    assert room.workload(waits_for_replacements)["metadata"]["uid"] == kept["uid"]


def test_an_evicted_group_takes_quota_back_although_it_has_no_pods(room: Room):
    first = room.add_pair(1, priority="low")
    room.wait("Running", *first)
    room.add("high", gpus=GPUS, priority="high")
    room.wait("Running", "high")
    room.delete("high")
    workload = room.workload(kueue.admitted)
    assert waits_for_replacements(workload)
    # So its replacements start one by one.
    room.add("job-2-0", group="job", priority="low")
    room.wait("Running", "job-2-0")


def test_a_failed_pod_keeps_the_quota_of_its_group(room: Room):
    first = room.add_pair(1, runs=(SLEEP, END.format(code=1)))
    room.wait("Failed", first[1])
    room.add("behind")
    room.workload(kueue.waiting, of="behind")
    room.delete(first[0])
    room.wait("Failed", first[0])
    assert condition(room.workload(waits_for_replacements), "WaitingForReplacementPods")["reason"] == "PodsFailed"
    room.wait("Running", *room.add_pair(2))
    assert gated(room.pod("behind"))


def test_a_replacement_is_known_by_its_role(room: Room):
    expression = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["bad-node"]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    first = room.add_pair(1, role="rank")
    room.wait("Running", *first)
    assert [entry["name"] for entry in room.workload()["spec"]["podSets"]] == ["rank"]
    room.delete(first[0])
    room.workload(waits_for_replacements)
    # Its role is a hash of its spec: with another node affinity it is another, and nothing says so.
    room.add("stranger", group="job", affinity=affinity)
    # With the role preset it is the same.
    room.add("job-2-0", group="job", affinity=affinity, role="rank")
    room.wait("Running", "job-2-0")
    assert gated(room.pod("stranger"))


def test_a_rank_that_succeeded_takes_the_place_of_a_replacement(cluster: ClusterHandle, room: Room):
    first = room.add_pair(1, runs=("pass", END.format(code=1)))
    room.wait("Succeeded", first[0])
    room.wait("Failed", first[1])
    room.add("job-2-0", group="job")
    room.wait("Running", "job-2-0")
    room.add("job-2-1", group="job")
    room.gone("job-2-1")
    event = "Normal ExcessPodDeleted job-2-1: Excess pod deleted"
    wait_until(lambda: event in cluster.events(namespace=room.namespace), describe=event)


def test_an_evicted_pod_that_exits_0_ends_its_group(room: Room):
    room.wait("Running", *room.add_pair(1, runs=(UNTIL_TERM.format(code=0),) * 2, priority="low"))
    before = room.workload()["metadata"]["uid"]
    room.add("high", gpus=GPUS, priority="high")
    room.gone("job-1-0", "job-1-1")
    room.wait("Running", "high")
    room.add_pair(2, priority="low")
    assert room.workload(kueue.waiting)["metadata"]["uid"] != before


class Leaving:
    """Ways to give quota back for good, tried on a group whose pods were deleted and stay because of the finalizer."""

    @staticmethod
    def annotation(room: Room) -> None:
        room.annotate("job-1-0", RETRIABLE, "false")

    @staticmethod
    def finalizers(room: Room) -> None:
        for name in ("job-1-0", "job-1-1"):
            room.cluster.release(name, namespace=room.namespace)

    @staticmethod
    def workload(room: Room) -> None:
        room.cluster.api.delete("workloads", "job", namespace=room.namespace)


@pytest.mark.parametrize("leave", [Leaving.annotation, Leaving.finalizers, Leaving.workload])
def test_deleted_pods_of_a_group_stay_and_hold_quota_until_it_is_let_go(room: Room, leave):
    first = room.add_pair(1)
    room.wait("Running", *first)
    room.add("behind")
    room.delete(*first)
    room.wait("Failed", *first)
    assert kueue.admitted(room.workload(waits_for_replacements))
    assert gated(room.pod("behind"))
    leave(room)
    room.gone(*first)
    room.cluster.wait_gone("workloads", "job", namespace=room.namespace)
    room.wait("Running", "behind")


@pytest.mark.parametrize("leave", [Leaving.finalizers, Leaving.workload])
def test_deleted_pods_of_a_waiting_group_stay_too(room: Room, leave):
    room.add("first", gpus=GPUS)
    room.wait("Running", "first")
    waiting = room.add_pair(1)
    room.workload(kueue.waiting)
    room.delete(*waiting)
    room.workload(waits_for_replacements)
    # The annotation does not help here: a pod that never ran has not ended.
    room.annotate("job-1-0", RETRIABLE, "false")
    room.after_kueue_looked("later")
    assert FINALIZER in room.pod("job-1-0")["metadata"]["finalizers"]
    leave(room)
    room.gone(*waiting)
    room.cluster.wait_gone("workloads", "job", namespace=room.namespace)


def test_a_failed_group_is_finished_by_annotation_and_its_pods_can_be_read(room: Room):
    first = room.add_pair(1, runs=(END.format(code=1),) * 2)
    room.wait("Failed", *first)
    room.workload(waits_for_replacements)
    room.annotate(first[0], RETRIABLE, "false")
    found = room.workload(lambda workload: condition(workload, "Finished"))
    # Whatever its name says: none of them succeeded.
    assert condition(found, "Finished")["reason"] == "Succeeded"
    assert condition(found, "Finished")["message"] == "Pods succeeded: 0/2."
    for name in first:
        room.cluster.wait_for("pods", name, lambda it: "finalizers" not in it["metadata"], namespace=room.namespace)
    with pytest.raises(ApiError, match="unretriable pod group can't be converted to retriable"):
        room.annotate(first[0], RETRIABLE, "true")
    # The name of the group is used up while the finished Workload exists.
    room.add_pair(2)
    room.after_kueue_looked("later")
    assert condition(room.workload(), "Finished")["status"] == "True"
    assert gated(room.pod("job-2-0"))


def test_deactivating_evicts_and_activating_queues_again(room: Room):
    first = room.add_pair(1)
    room.wait("Running", *first)
    room.cluster.api.patch("workloads", "job", {"spec": {"active": False}}, namespace=room.namespace)
    for found in room.wait("Failed", *first):
        assert condition(found, "TerminationTarget")["reason"] == "WorkloadEvictedDueToDeactivated"
    found = room.workload(lambda workload: condition(workload, "Admitted")["status"] == "False")
    assert condition(found, "Evicted")["reason"] == "Deactivated"
    second = room.add_pair(2)
    room.gone(*first)
    assert all(gated(room.pod(name)) for name in second)
    room.cluster.api.patch("workloads", "job", {"spec": {"active": True}}, namespace=room.namespace)
    room.wait("Running", *second)
