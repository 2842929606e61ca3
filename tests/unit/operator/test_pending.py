"""Why a pod waits: the words of scheduler and kubelet become one cause with a hint."""

from typing import Any

import pytest

from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.policies.pending import why_waiting
from diffusion_operator.state import SeenPod
from testkit.builders import at, container, make_job, make_pod, make_profile

PROFILE = ProfileSpec.model_validate(make_profile()["spec"])
JOB = make_job()


def unscheduled(message: str, reason: str = "Unschedulable") -> SeenPod:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return SeenPod(make_pod(JOB, status={"conditions": [condition]}))


def waiting(reason: str, message: str = "") -> SeenPod:
    return SeenPod(make_pod(JOB, node="n1", status=container(waiting={"reason": reason, "message": message})))


def mount_event(message: str, *, seconds: float = 0, pod: str = "0d9c3a52-pod-1-0") -> dict[str, Any]:
    return {
        "reason": "FailedMount",
        "message": message,
        "lastTimestamp": at(seconds),
        "involvedObject": {"uid": pod},
    }


@pytest.mark.parametrize(
    ("pod", "cause"),
    [
        (unscheduled("0/3: 1 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint(s)."), "InsufficientGPU"),
        (unscheduled("0/3: 3 Insufficient memory."), "InsufficientResources"),
        (unscheduled("0/2: 2 node(s) didn't match Pod's node affinity/selector."), "TaintOrSelectorMismatch"),
        (unscheduled("0/1: 1 node(s) had untolerated taint {nvidia.com/gpu: x}."), "TaintOrSelectorMismatch"),
        (unscheduled("no nodes available to schedule pods"), "Unschedulable"),
        (unscheduled("", reason="SchedulingGated"), "SchedulingGated"),
        (waiting("ImagePullBackOff", 'Back-off pulling image "x"'), "ImagePullFailed"),
        (waiting("ErrImagePull"), "ImagePullFailed"),
        (waiting("InvalidImageName"), "ImagePullFailed"),
        (waiting("CreateContainerConfigError", 'secret "x" not found'), "ContainerConfigError"),
    ],
)
def test_causes(pod: SeenPod, cause: str) -> None:
    why = why_waiting(pod, (), PROFILE)
    assert why is not None
    assert why[0] == cause
    assert why[2]


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert why_waiting(SeenPod(make_pod(JOB)), (), PROFILE) is None
    assert why_waiting(waiting("ContainerCreating"), (), PROFILE) is None


class TestMounts:
    def why(self, *events: dict[str, Any]) -> str | None:
        found = why_waiting(waiting("ContainerCreating"), events, PROFILE)
        return found[0] if found else None

    @pytest.mark.parametrize(
        "message",
        [
            'MountVolume.SetUp failed for volume "credentials" : secret "team-a-s3" not found',
            'MountVolume.SetUp failed for volume "credentials" : references non-existent secret key: AWS_ACCESS_KEY_ID',
        ],
    )
    def test_a_missing_secret_or_key(self, message: str) -> None:
        assert self.why(mount_event(message)) == "MissingSecret"

    def test_other_volumes(self) -> None:
        assert self.why(mount_event('persistentvolumeclaim "data" not found')) == "MissingVolume"
        assert self.why(mount_event("Unable to attach or mount volumes: timed out")) == "MountFailed"

    def test_the_newest_event_counts(self) -> None:
        old, new = mount_event('secret "a" not found'), mount_event("timed out", seconds=5)
        assert self.why(new, old) == "MountFailed"

    def test_other_pods_and_other_reasons_do_not(self) -> None:
        other = mount_event('secret "a" not found', pod="another")
        assert self.why(other, {**mount_event("x"), "reason": "Pulling"}) is None
