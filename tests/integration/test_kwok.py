"""Nodes of kwok behave as tests of scale need it: real scheduling by GPUs and labels, pods that start, end and go."""

from __future__ import annotations

import pytest

from testkit.cluster import NodeSpec
from testkit.controlplane import ControlPlane
from testkit.kube import Kube, condition
from testkit.kwok import FakeNodes, Scheduler, ends
from testkit.pods import ending, pod

KEEP = "testkit.example/keep"
PRESENT = "nvidia.com/gpu=present:NoSchedule"

pytestmark = pytest.mark.apiserver


@pytest.fixture(scope="module")
def kube():
    with ControlPlane() as control, Scheduler(control.kube), FakeNodes(control.kube) as nodes:
        labels = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
        nodes.add([NodeSpec(f"a100-{number}", gpus=8, labels=labels, taints=[PRESENT]) for number in range(20)])
        nodes.add([NodeSpec("cpu-1")])
        yield control.kube


@pytest.fixture
def namespace(kube: Kube, request: pytest.FixtureRequest):
    with kube.namespace(request.node.name) as name:
        yield name


def test_gpus_of_many_nodes_are_shared_out_and_no_more(kube: Kube, namespace: str):
    for number in range(21):
        kube.api.create("pods", pod(f"job-{number}", image="none", gpus=8), namespace=namespace)
    late = kube.wait_for("pods", "job-20", lambda found: condition(found, "PodScheduled"), namespace=namespace)
    for number in range(20):
        kube.wait_phase(f"job-{number}", "Running", namespace=namespace)
    nodes = {entry["spec"].get("nodeName") for entry in kube.items("pods", namespace=namespace)}
    assert nodes == {f"a100-{number}" for number in range(20)} | {None}
    assert "21 Insufficient nvidia.com/gpu" in condition(late, "PodScheduled")["message"]


@pytest.mark.parametrize(("code", "phase"), [(0, "Succeeded"), (75, "Failed")])
def test_a_pod_ends_as_it_is_told(kube: Kube, namespace: str, code: int, phase: str):
    wanted = ends(pod("main", image="none"), after="100ms", exit_code=code)
    kube.api.create("pods", wanted, namespace=namespace)
    found = kube.wait_phase("main", phase, namespace=namespace)
    assert ending(found)["exitCode"] == code
    assert found["spec"]["nodeName"] == "cpu-1"


def test_a_deleted_pod_shows_its_end_before_it_goes(kube: Kube, namespace: str):
    for name, finalizers in (("kept", [KEEP]), ("plain", [])):
        kube.api.create("pods", pod(name, image="none", finalizers=finalizers), namespace=namespace)
        kube.wait_phase(name, "Running", namespace=namespace)
        kube.api.delete("pods", name, namespace=namespace)
    found = kube.wait_for("pods", "kept", ending, namespace=namespace)
    assert (found["status"]["phase"], ending(found)["exitCode"]) == ("Failed", 143)
    kube.wait_gone("pods", "plain", namespace=namespace)
