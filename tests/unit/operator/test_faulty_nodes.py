"""Nodes at fault are avoided for a while: which, by what cause, for how long, and how the pods are told."""

from datetime import timedelta

import pytest

from diffusion_operator.state import SeenPod
from testkit.builders import NOW, Object, at, deleting, disrupted, last_word, make_job, make_pod, terminated
from testkit.deciding import after, ask, ended, running

FAULT = terminated(82, message=last_word(82, message="Xid 79: the GPU has fallen off the bus"))
HOUR = 3600


def excluded(job: Object) -> list[tuple[str, str, str]]:
    return [(entry["node"], entry["until"], entry["reason"]) for entry in job["status"].get("excludedNodes", [])]


def avoids(manifest: Object) -> list[str]:
    terms = manifest["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    found = {
        tuple(entry["values"])
        for term in terms["nodeSelectorTerms"]
        for entry in term["matchExpressions"]
        if (entry["key"], entry["operator"]) == ("kubernetes.io/hostname", "NotIn")
    }
    return sorted(node for nodes in found for node in nodes)


def test_a_broken_gpu_is_avoided_for_a_day_and_no_longer() -> None:
    job, _ = running()
    job = after(job, ask(job, ended(job, FAULT)))
    assert excluded(job) == [("n1", at(24 * HOUR), "GPUFault")]
    (manifest,) = ask(job, seconds=11).create
    assert avoids(manifest) == ["n1"]
    (manifest,) = ask(job, seconds=24 * HOUR - 1).create
    assert avoids(manifest) == ["n1"]
    (manifest,) = ask(job, seconds=24 * HOUR).create
    assert avoids(manifest) == []


def test_the_pods_of_an_attempt_are_the_same_whenever_they_are_created() -> None:
    job, _ = running()
    job = after(job, ask(job, ended(job, FAULT)))
    begun = ask(job, seconds=24 * HOUR - 5)
    assert ask(after(job, begun), seconds=24 * HOUR + 5).create == begun.create


@pytest.mark.parametrize(
    ("reason", "avoided"),
    [("UnexpectedAdmissionError", True), ("OutOfnvidia.com/gpu", True), ("OutOfcpu", False), ("NodeAffinity", False)],
)
def test_a_node_that_refused_the_pod_for_its_gpus(reason: str, avoided: bool) -> None:
    job, _ = running()
    pod = ended(job, {"reason": reason, "message": "no"})
    job = after(job, ask(job, pod))
    assert job["status"]["attempts"][0]["cause"] == "AdmissionRejected"
    assert excluded(job) == ([("n1", at(HOUR), "AdmissionRejected")] if avoided else [])


def test_a_lost_node_only_when_it_is_lost_again() -> None:
    job, _ = running()
    lost = disrupted("DeletionByTaintManager")
    job = after(job, ask(job, SeenPod(ended(job, lost, **deleting()), gone=True)))
    assert (excluded(job), job["status"]["attempts"][1]["cause"]) == ([], "NodeLost")
    once_more = make_pod(job, attempt=2, phase="Failed", node="n1", status=lost, metadata=deleting())
    decision = ask(job, SeenPod(once_more, gone=True))
    job = after(job, decision)
    assert excluded(job) == [("n1", at(HOUR), "NodeLost")]
    (manifest,) = decision.create
    assert avoids(manifest) == ["n1"]


def test_of_several_nodes_only_the_one_at_fault() -> None:
    job, _ = running(make_job(resources={"nodes": 2}, training={"batchSize": 2}))
    other = make_pod(job, rank=1, phase="Failed", node="n2", status=terminated(81, message=last_word(81)))
    job = after(job, ask(job, ended(job, FAULT), other))
    assert [node for node, _, _ in excluded(job)] == ["n1"]


@pytest.mark.parametrize("code", [1, 64, 69, 75, 80, 81, 83])
def test_no_node_is_blamed_for_anything_else(code: int) -> None:
    job, _ = running()
    assert excluded(after(job, ask(job, ended(job, terminated(code, message=last_word(code)))))) == []


def test_the_list_is_bounded_and_drops_what_is_over() -> None:
    job, _ = running()
    entries = [{"node": f"old{n}", "until": at(-n), "reason": "GPUFault"} for n in range(3)]
    entries += [{"node": f"x{n:02}", "until": at(100 + n), "reason": "GPUFault"} for n in range(16)]
    job["status"]["excludedNodes"] = entries[-16:]
    job = after(job, ask(job, ended(job, FAULT)))
    assert [node for node, _, _ in excluded(job)] == [f"x{n:02}" for n in range(1, 16)] + ["n1"]
    job["status"]["excludedNodes"] = entries[:3]
    job["status"]["attempts"][0].pop("endedAt")
    assert [node for node, _, _ in excluded(after(job, ask(job, ended(job, FAULT))))] == ["n1"]


def test_the_same_node_again_is_one_entry_with_a_new_end() -> None:
    job, _ = running()
    job["status"]["excludedNodes"] = [{"node": "n1", "until": at(60), "reason": "NodeLost"}]
    job = after(job, ask(job, ended(job, FAULT)))
    until = (NOW + timedelta(hours=24)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert excluded(job) == [("n1", until, "GPUFault")]
