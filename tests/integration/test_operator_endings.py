"""How attempts end, on a real API server: what nodes say, heard by the operator's own watch, with its own rights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from diffusion_api.outcomes import OF_CAUSE, OUTCOMES, Action, Cause
from diffusion_operator.node_state import LOST_AFTER
from diffusion_operator.policies.vain_start import IN_VAIN
from testkit.builders import last_word, make_job
from testkit.kube import Kube, Object
from testkit.operating import JOBS, Installation, Kubelet, OperatorProcess, User, installed

pytestmark = pytest.mark.apiserver


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("endings")) as found, OperatorProcess(found):
        yield found


@pytest.fixture
def place(installation: Installation, request: pytest.FixtureRequest) -> Iterator[tuple[User, Kubelet]]:
    with installation.kube.namespace(request.node.originalname) as name:
        yield User(installation.kube, name), Kubelet(installation.kube, name)


@contextmanager
def a_node(kube: Kube, name: str) -> Iterator[str]:
    """A node of that name that is well; nobody but the test says anything about it."""
    kube.api.create("nodes", {"metadata": {"name": name}})
    try:
        say(kube, name, ready="True")
        yield name
    finally:
        if kube.find("nodes", name):
            kube.api.delete("nodes", name)


def say(kube: Kube, name: str, *taints: Object, ready: str) -> None:
    """Say of a node what its kubelet and the node controller would."""
    condition = {"type": "Ready", "status": ready, "reason": "Test", "message": ""}
    kube.api.patch("nodes", name, {"status": {"conditions": [condition]}}, subresource="status")
    kube.api.patch("nodes", name, {"spec": {"taints": list(taints)}})


def test_a_lost_node_is_not_waited_for(place: tuple[User, Kubelet], installation: Installation) -> None:
    user, kubelet = place
    with a_node(installation.kube, "dies") as node:
        user.create(make_job(runPolicy={"backoffLimit": 0}))
        kubelet.run("cats-1-0", node=node)
        user.wait_phase("Preparing")
        since = "2026-01-02T03:04:05Z"
        taint = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": since}
        say(installation.kube, node, taint, ready="Unknown")
        kubelet.run("cats-2-0", node="elsewhere")
        status = user.wait_phase("Preparing", attempt=2)
        ended = status["attempts"][1]
        assert (ended["cause"], ended["nodes"], status["counters"]["failures"]) == ("NodeLost", [node], 0)
        assert f"node {node} does not answer" in ended["message"]
        found = installation.kube.wait_for(
            "pods", "cats-1-0", lambda pod: "deletionTimestamp" in pod["metadata"], namespace=user.namespace
        )
        assert found["metadata"]["deletionGracePeriodSeconds"] > 0, "never by force: its node may come back"
    assert LOST_AFTER.total_seconds() < 60, "much less than the cluster itself waits"


def test_a_node_that_is_gone_takes_its_pods_along(place: tuple[User, Kubelet], installation: Installation) -> None:
    user, kubelet = place
    with a_node(installation.kube, "vanishes") as node:
        user.create(make_job(runPolicy={"backoffLimit": 0}))
        kubelet.run("cats-1-0", node=node)
        user.wait_phase("Preparing")
        installation.kube.api.delete("nodes", node)
        kubelet.run("cats-2-0", node="elsewhere")
        status = user.wait_phase("Preparing", attempt=2)
        assert (status["attempts"][1]["cause"], status["counters"]["failures"]) == ("NodeLost", 0)


def test_a_spot_notice_is_acted_upon(place: tuple[User, Kubelet], installation: Installation) -> None:
    user, kubelet = place
    with a_node(installation.kube, "spot") as node:
        user.create(make_job(runPolicy={"backoffLimit": 0}))
        kubelet.run("cats-1-0", node=node)
        user.wait_phase("Preparing")
        taint = {"key": "aws-node-termination-handler/spot-itn", "value": "1", "effect": "NoSchedule"}
        say(installation.kube, node, taint, ready="True")
        told = installation.kube.wait_for(
            "pods", "cats-1-0", lambda pod: "deletionTimestamp" in pod["metadata"], namespace=user.namespace
        )
        assert told["metadata"]["deletionGracePeriodSeconds"] == 120, "the trainer has its whole grace to save"
        kubelet.end("cats-1-0", 75, message=last_word(75, step=300))
        kubelet.remove("cats-1-0")
        kubelet.run("cats-2-0", node="elsewhere")
        status = user.wait_phase("Preparing", attempt=2)
        ended = status["attempts"][1]
        assert (ended["cause"], ended["reachedStep"], status["counters"]["failures"]) == ("Preempted", 300, 0)
        assert "aws-node-termination-handler/spot-itn" in ended["message"]


class Play:
    """One job whose first attempt ends in a certain way."""

    def __init__(self, kube: Kube, user: User, kubelet: Kubelet, cause: Cause) -> None:
        self.kube, self.user, self.kubelet = kube, user, kubelet
        self.job = cause.lower()
        self.pod = f"{self.job}-1-0"

    def starts(self, **spec: Any) -> None:
        """Create the job and let its pod run."""
        self.user.create(make_job(name=self.job, **spec))
        self.kubelet.run(self.pod, node="node-1")

    def exits(self, code: int, **said: Any) -> None:
        """Let the trainer end by itself."""
        self.starts(training={"batchSize": 8})
        self.kubelet.end(self.pod, code, message=last_word(code, **said))

    def told(self) -> None:
        """Wait until the operator has told the pod to stop; then let it end as trainers do."""
        asked = lambda pod: "deletionTimestamp" in pod["metadata"]  # noqa: E731
        self.kube.wait_for("pods", self.pod, asked, namespace=self.user.namespace)
        self.kubelet.end(self.pod, 75, message=last_word(75, step=7))
        self.kubelet.remove(self.pod)

    def disrupted(self, reason: str) -> None:
        """Do to the pod what the cluster does."""
        self.starts()
        condition_ = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "room"}
        self.kubelet.patch(self.pod, conditions=[condition_])
        self.kube.api.delete("pods", self.pod, namespace=self.user.namespace)
        self.kubelet.remove(self.pod)

    def fails(self, reason: str, message: str) -> None:
        """Let the kubelet end the pod as a whole."""
        self.starts()
        self.kubelet.patch(self.pod, phase="Failed", reason=reason, message=message)

    def waits_in_vain(self, event: str, message: str, waiting: Object | None = None) -> None:
        """Let the pod wait on its node since a long time ago."""
        self.user.create(make_job(name=self.job))
        self.kubelet.wait_for_pod(self.pod)
        container = {"name": "trainer", "image": "t", "imageID": "", "ready": False, "restartCount": 0}
        if waiting:
            self.kubelet.patch(self.pod, containerStatuses=[{**container, "state": {"waiting": waiting}}])
        self.kubelet.tell(self.pod, event, message)
        self.kubelet.bind(self.pod)
        vain = lambda job: job.get("status", {}).get("pending", {}).get("cause") in IN_VAIN  # noqa: E731
        job = self.kube.wait_for(JOBS, self.job, vain, namespace=self.user.namespace)
        pending = {**job["status"]["pending"], "since": "2026-01-02T03:04:05Z"}
        self.status(pending=pending)
        self.told()

    def status(self, **changes: Any) -> None:
        """Merge into the status, as nobody but a test may."""
        self.kube.api.patch(JOBS, self.job, {"status": changes}, namespace=self.user.namespace, subresource="status")


def crashes_twice(play: Play) -> None:
    play.exits(1, step=7)
    play.user.wait_phase("Interrupted", play.job)
    play.status(nextAttemptAt="2026-01-02T03:04:05Z")
    play.kubelet.run(f"{play.job}-2-0")
    play.kubelet.end(f"{play.job}-2-0", 1, message=last_word(1, attempt=2, step=7))


def is_suspended(play: Play) -> None:
    play.starts()
    play.user.change(play.job, suspend=True)
    play.told()


def waits_too_long(play: Play) -> None:
    play.user.create(make_job(name=play.job, runPolicy={"pendingDeadlineSeconds": 1}))


def finds_no_node(play: Play) -> None:
    play.user.create(make_job(name=play.job, resources={"capacity": "Any", "failoverSeconds": 0}))
    play.kubelet.wait_for_pod(play.pod)
    said = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition_ = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    play.kubelet.patch(play.pod, conditions=[condition_])


def runs_too_long(play: Play) -> None:
    play.starts(runPolicy={"activeDeadlineSeconds": 1000})
    play.status(startTime="2026-01-02T03:04:05Z")
    play.told()


def costs_too_much(play: Play) -> None:
    play.user.create(make_job(name=play.job, runPolicy={"maxGPUHours": 1}))
    play.kubelet.run(play.pod, address="127.9.9.9")  # since months ago
    play.told()


PLAYS: dict[Cause, Callable[[Play], None]] = {
    Cause.COMPLETED: lambda play: play.exits(0),
    Cause.BAD_CONFIG: lambda play: play.exits(64),
    Cause.BAD_DATA: lambda play: play.exits(65),
    Cause.INPUT_MISSING: lambda play: play.exits(66),
    Cause.PERMISSION_DENIED: lambda play: play.exits(77),
    Cause.DIVERGED: lambda play: play.exits(70),
    Cause.STORAGE_UNAVAILABLE: lambda play: play.exits(69),
    Cause.PREEMPTED: lambda play: play.disrupted("PreemptionByScheduler"),
    Cause.SUSPENDED: is_suspended,
    Cause.NODE_LOST: lambda play: play.disrupted("DeletionByPodGC"),
    Cause.NO_CAPACITY: finds_no_node,
    Cause.CUDA_OUT_OF_MEMORY: lambda play: play.exits(80),
    Cause.COLLECTIVE_TIMEOUT: lambda play: play.exits(81),
    Cause.GPU_FAULT: lambda play: play.exits(82),
    Cause.HANG: lambda play: play.exits(83),
    Cause.FENCED: lambda play: play.exits(84),
    Cause.HOST_OUT_OF_MEMORY: lambda play: (play.starts(), play.kubelet.end(play.pod, 137, reason="OOMKilled"))[0],
    Cause.EPHEMERAL_STORAGE: lambda play: play.fails(
        "Evicted", "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi."
    ),
    Cause.IMAGE_PULL_FAILED: lambda play: play.waits_in_vain(
        "Failed",
        'Failed to pull image "t": not found',
        {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "t": ErrImagePull: not found'},
    ),
    Cause.MOUNT_FAILED: lambda play: play.waits_in_vain(
        "FailedMount", 'MountVolume.SetUp failed for volume "data" : mount failed: exit status 32'
    ),
    Cause.ADMISSION_REJECTED: lambda play: play.fails("UnexpectedAdmissionError", "Allocate failed"),
    Cause.CRASH: lambda play: play.exits(1),
    Cause.REPEATED_CRASH: crashes_twice,
    Cause.DEADLINE_EXCEEDED: runs_too_long,
    Cause.PENDING_DEADLINE_EXCEEDED: waits_too_long,
    Cause.GPU_HOURS_EXCEEDED: costs_too_much,
}
FINAL = {outcome.cause for outcome in OUTCOMES if outcome.action in {Action.SUCCEED, Action.FAIL}}


def test_each_class_of_endings(place: tuple[User, Kubelet], installation: Installation) -> None:
    """All at the same time. The last attempt that ended has the cause; a job that goes on is not marked as failed."""
    user, kubelet = place
    assert set(PLAYS) == set(Cause)
    for cause, play in PLAYS.items():
        play(Play(installation.kube, user, kubelet, cause))
    found: dict[str, str] = {}
    for cause in PLAYS:

        def ended(job: Object) -> bool:
            return any(attempt.get("endedAt") for attempt in job.get("status", {}).get("attempts", []))

        wanted = (lambda job: job["status"]["phase"] in {"Complete", "Failed"}) if cause in FINAL else ended
        name = cause.lower()
        job = installation.kube.wait_for(JOBS, name, wanted, namespace=user.namespace, describe=f"the end by {cause}")
        attempts = [attempt for attempt in job["status"]["attempts"] if attempt.get("endedAt")]
        found[cause] = attempts[0]["cause"]
        failed = job["status"]["phase"] == "Failed"
        assert failed == (cause in FINAL - {Cause.COMPLETED}), (cause, job["status"])
        charged = OF_CAUSE[cause].action == Action.RETRY or cause == Cause.REPEATED_CRASH
        assert bool(job["status"]["counters"]["failures"]) == charged, cause
    assert found == {cause: cause for cause in PLAYS}
