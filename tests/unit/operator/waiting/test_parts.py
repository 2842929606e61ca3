"""The parts of a diagnosis, pinned by values worked out by hand from Kubernetes' rules."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from diffusion_api import reference
from diffusion_api.waiting import RANK, WaitingCause
from diffusion_api.waiting_table import OF_WAIT, WAITS, hint
from diffusion_operator.policies.waiting import messages, nodes, occupancy, reading, scheduling
from diffusion_operator.policies.waiting.facts import WaitingFacts


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16Gi", 16 * 2**30), ("250m", Decimal("0.25")), ("1e3", 1000), (4, 4), ("1.5k", 1500), ("", 0), (None, 0),
        (True, 0), ("4GiB", 0), ("NaN", 0), ("1e999999999", 0), ([], 0), ("12E", Decimal(12) * 10**18),
    ],
)  # fmt: skip
def test_quantity(text: object, value: object) -> None:
    assert reading.quantity(text) == value


def test_scheduler_message() -> None:
    said = (
        "0/12 nodes are available: 2 node(s) had untolerated taint {nvidia.com/gpu: present}, 3 Insufficient "
        "nvidia.com/gpu, 7 node(s) didn't match Pod's node affinity/selector. preemption: 0/12 nodes are available: "
        "3 No preemption victims found for incoming pod, 9 Preemption is not helpful for scheduling."
    )
    found = messages.scheduler(said)
    assert [(reason.count, reason.why) for reason in found] == [
        (2, "node(s) had untolerated taint {nvidia.com/gpu: present}"),
        (3, "Insufficient nvidia.com/gpu"),
        (7, "node(s) didn't match Pod's node affinity/selector"),
    ]
    assert messages.taint_in(found[0]) == "nvidia.com/gpu=present"


def test_scheduler_message_about_claims_has_no_counts() -> None:
    found = messages.scheduler('0/3 nodes are available: persistentvolumeclaim "data" not found. preemption: 0/3')
    assert [(reason.count, reason.why) for reason in found] == [(0, 'persistentvolumeclaim "data" not found')]


@pytest.mark.parametrize(
    "said",
    [
        "pod didn't trigger scale-up: 1 max node group size reached, 2 node(s) had untolerated taint {a: b}",
        "pod didn't trigger scale-up (it wouldn't fit if a new node is added): 1 max limit reached, 2 Too many pods",
    ],
)
def test_autoscaler_message(said: str) -> None:
    assert [reason.count for reason in messages.autoscaler(said)] == [1, 2]


def node(*, labels: dict[str, str] | None = None, taints: list[dict[str, str]] | None = None) -> dict[str, object]:
    return {"metadata": {"name": "n", "labels": labels or {}}, "spec": {"taints": taints or []}}


def wants(operator: str, *values: str) -> dict[str, object]:
    term = {"matchExpressions": [{"key": "k", "operator": operator, "values": list(values)}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    return {"spec": {"affinity": {"nodeAffinity": required}}}


@pytest.mark.parametrize(
    ("operator", "values", "label", "fits"),
    [
        ("In", ["a", "b"], "b", True), ("In", ["a"], None, False), ("NotIn", ["a"], None, True),
        ("NotIn", ["a"], "a", False), ("Exists", [], "x", True), ("Exists", [], None, False),
        ("DoesNotExist", [], None, True), ("Gt", ["70000"], "81920", True), ("Gt", ["81920"], "81920", False),
        ("Lt", ["10"], "9", True), ("Gt", ["1"], "large", False), ("Gt", ["1"], None, False),
        ("Like", ["a"], "a", False),
    ],
)  # fmt: skip
def test_affinity(operator: str, values: list[str], label: str | None, *, fits: bool) -> None:
    found = node(labels={"k": label} if label is not None else {})
    assert nodes.matches(wants(operator, *values), found) is fits


def test_terms_are_alternatives_and_an_empty_one_matches_nothing() -> None:
    pod = wants("In", "a")
    terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]  # type: ignore[index]
    terms["nodeSelectorTerms"].append({"matchExpressions": [{"key": "k", "operator": "In", "values": ["b"]}]})
    assert nodes.matches(pod, node(labels={"k": "b"}))
    terms["nodeSelectorTerms"] = [{}]
    assert not nodes.matches(pod, node(labels={"k": "b"}))


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ({"key": "k", "operator": "Exists"}, True),
        ({"key": "k", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "k", "value": "v", "effect": "NoSchedule"}, True),
        ({"key": "k", "value": "w"}, False),
        ({"operator": "Exists"}, True),
        ({"value": "v"}, False),
    ],
)
def test_toleration(toleration: dict[str, str], *, tolerated: bool) -> None:
    tainted = node(
        taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}, {"key": "p", "effect": "PreferNoSchedule"}]
    )
    found = nodes.untolerated({"spec": {"tolerations": [toleration]}}, tainted)
    assert found == ([] if tolerated else ["k=v:NoSchedule"])


def test_requests_are_counted_as_the_scheduler_does() -> None:
    """max(init, sum of containers and sidecars) + overhead; a limit without a request is a request."""
    pod = {
        "spec": {
            "containers": [
                {"resources": {"requests": {"cpu": "2"}}},
                {"resources": {"limits": {"cpu": "1", "nvidia.com/gpu": 2}}},
            ],
            "initContainers": [
                {"restartPolicy": "Always", "resources": {"requests": {"cpu": "500m"}}},
                {"resources": {"requests": {"cpu": "3", "memory": "1Gi"}}},
            ],
            "overhead": {"cpu": "100m"},
        }
    }
    found = occupancy.requested(pod)
    assert found == {"cpu": Decimal("3.6"), "nvidia.com/gpu": 2, "memory": 2**30, "pods": 1}


def test_rows_are_unique_and_hints_say_what_is_missing() -> None:
    assert len(OF_WAIT) == len(WAITS)
    assert set(RANK) == set(WaitingCause)
    assert hint(WaitingCause.NO_SUCH_NODE, resource="nvidia.com/gpu").startswith("add nodes with nvidia.com/gpu")
    assert "<resource>" in hint(WaitingCause.NO_SUCH_NODE)


def test_every_cause_is_documented() -> None:
    text = reference.why_it_waits()
    assert all(f"`{cause}`" in text for cause in WaitingCause)


def _pod(*, gates: tuple[str, ...]) -> dict[str, object]:
    """Return a pod of which the scheduler has said nothing but that it is gated."""
    return {
        "metadata": {"name": "cats-1-0", "namespace": "team-a", "creationTimestamp": "2026-11-25T00:00:00Z"},
        "spec": {"schedulingGates": [{"name": gate} for gate in gates]},
        "status": {
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "SchedulingGated",
                    "message": "Scheduling is blocked due to non-empty scheduling gates",
                }
            ]
        },
    }


def test_a_gate_of_an_admitted_job_is_about_to_go() -> None:
    pod = _pod(gates=("kueue.x-k8s.io/admission",))
    workload = {"status": {"conditions": [{"type": "Admitted", "status": "True", "reason": "Admitted"}]}}
    now = datetime(2026, 11, 25, 0, 0, 30, tzinfo=UTC)
    found = scheduling.why_not_scheduled(WaitingFacts(pods=(pod,), workload=workload), pod, now=now)
    assert (found.cause, "kueue-system" in found.hint) == (WaitingCause.STARTING, False)


@pytest.mark.parametrize(
    ("requirement", "forbids"),
    [
        ("kubernetes.io/hostname NotIn [a100-1]", True), ("gke-gpu-partition-size DoesNotExist", True),
        ("nvidia.com/gpu.product In [A100]", False), ("pool=NotIn", False), ("gpu-memory Gt [80000]", False),
    ],
)  # fmt: skip
def test_requirements_that_forbid(requirement: str, *, forbids: bool) -> None:
    assert nodes.forbids(requirement) is forbids


@pytest.mark.parametrize(
    ("gates", "cause"),
    [
        (("kueue.x-k8s.io/topology",), WaitingCause.STARTING),
        ((), WaitingCause.STARTING),
        (("example.com/approval", "kueue.x-k8s.io/topology"), WaitingCause.GATED),
    ],
)
def test_a_pod_whose_gates_are_being_taken_away(gates: tuple[str, ...], cause: WaitingCause) -> None:
    pod = _pod(gates=gates)
    found = scheduling.why_not_scheduled(
        WaitingFacts(pods=(pod,)), pod, now=datetime(2026, 11, 25, 0, 0, 5, tzinfo=UTC)
    )
    assert found.cause == cause
    assert "kueue" not in found.hint
