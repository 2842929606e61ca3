"""Every ending of the corpus is given its cause; the confusion matrix is printed (`pytest -s`) and published.

`docs/reliability/causes.md` holds the matrix; this test compares it, and says what to put there.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_api import names
from diffusion_api.outcomes import OF_CAUSE, Action, Cause
from diffusion_operator import timestamps
from diffusion_operator.decide import decide
from diffusion_operator.node_state import NodeStates
from diffusion_operator.state import Job, Observed, SeenPod
from diffusion_operator.status import to_object
from testkit.builders import NOW, Object, make_job, make_pod, make_profile, merge
from testkit.deciding import after, ask, started

CORPUS = Path(__file__).parent / "corpus.yaml"
PAGE = Path(__file__).resolve().parents[4] / "docs" / "reliability" / "causes.md"
LEAST_ENDINGS = 75
Case = dict[str, Any]


@cache
def corpus() -> tuple[Case, ...]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return tuple(yaml.load(CORPUS.read_text(), Loader=loader))


def begun(case: Case) -> Object:
    """Return the job with the attempt under way."""
    spec = dict(case.get("job", {}))
    suspend = spec.pop("suspend", False)
    job = started(make_job(**spec))
    ranks = range(len(case["pods"]))
    job = after(job, ask(job, *(make_pod(job, rank=rank, phase="Running", node=f"gpu-{rank + 1}") for rank in ranks)))
    job["status"] = merge(job["status"], case.get("status", {}))
    job["spec"]["suspend"] = suspend
    return job


def seen(case: Case, pods: list[Case], job: Object) -> Observed:
    """Return what the operator sees of these pods and nodes."""
    states = NodeStates()
    for node in case.get("nodes", ()):
        states.put(node)
    for name in case.get("gone", ()):
        states.remove({"metadata": {"name": name}})
    found = []
    for pod in pods:
        rank = int(pod["metadata"].get("labels", {}).get(names.LABEL_RANK, 0))
        raw = make_pod(job, attempt=case.get("attempt", 1), rank=rank) | {"spec": pod["spec"], "status": pod["status"]}
        raw["metadata"] |= {key: value for key, value in pod["metadata"].items() if key.startswith("deletion")}
        node = pod["spec"].get("nodeName", "")
        found.append(SeenPod(raw, gone=pod.get("gone", False), node_state=states.of(node)))
    return Observed(trainer_image="t", profile=make_profile(), pods=tuple(found))


def ending(case: Case) -> Object:
    """Return what the status says of the attempt when it has ended, with the counters."""
    job = begun(case)
    now = timestamps.from_text(case["now"])
    for pods in (case["pods"], *[case.get("then", case["pods"])] * 3):
        decision = decide(Job.read(job), seen(case, pods, job), now=now)
        if decision.status is not None:
            job = {**job, "status": to_object(decision.status)}
        for attempt in job["status"]["attempts"]:
            if attempt["number"] == case.get("attempt", 1) and attempt.get("endedAt"):
                return {**attempt, "failures": job["status"]["counters"]["failures"]}
    raise AssertionError(f"{case['name']}: the attempt does not end: {job['status']}")


def matrix() -> str:
    """Return the confusion matrix: a row for each true cause, with how often which cause was found."""
    counts = Counter((case["cause"], ending(case)["cause"]) for case in corpus())
    lines = ["| true cause | endings | found |", "|---|---|---|"]
    for cause in Cause:
        found = {what: number for (true, what), number in sorted(counts.items()) if true == cause}
        words = ", ".join(f"`{what}` {number}" for what, number in found.items())
        lines.append(f"| `{cause}` | {sum(found.values())} | {words} |")
    right = sum(number for (true, what), number in counts.items() if true == what)
    return "\n".join([*lines, "", f"{right} of {len(corpus())} right."])


def test_the_confusion_matrix_is_published() -> None:
    found = matrix()
    print(f"\n{found}")
    assert found in PAGE.read_text(), f"put this into {PAGE.name}:\n{found}"
    sources = Counter(case["source"].split(",")[0].split(" on ")[0] for case in corpus())
    for source, number in sources.items():
        assert f"{number} {source}" in PAGE.read_text(), f"{PAGE.name}: {number} endings are {source}"


@pytest.mark.parametrize("case", corpus(), ids=lambda case: case["name"])
def test_ending(case: Case) -> None:
    """Cause and charge are right, and the status says how it is known."""
    found = ending(case)
    assert found["cause"] == case["cause"], found
    charged = OF_CAUSE[Cause(case["cause"])].action == Action.RETRY or case["cause"] == Cause.REPEATED_CRASH
    assert bool(found["failures"]) == charged
    assert found["message"], "nothing is said of it"


def test_every_cause_is_in_the_corpus() -> None:
    assert {case["cause"] for case in corpus()} == set(Cause)
    assert len(corpus()) >= LEAST_ENDINGS
    assert len({case["name"] for case in corpus()}) == len(corpus())


def test_the_order_of_pods_does_not_matter() -> None:
    for case in corpus():
        backwards = {**case, "pods": case["pods"][::-1]}
        assert ending(backwards)["cause"] == case["cause"], case["name"]


def test_a_wrong_label_would_be_noticed() -> None:
    """Negative control: a preemption without its evidence is something else."""
    case = next(case for case in corpus() if case["name"] == "graceful-node-shutdown")
    bare = {key: value for key, value in case["pods"][0]["status"].items() if key in {"phase", "startTime"}}
    assert ending({**case, "pods": [{**case["pods"][0], "status": bare}]})["cause"] != case["cause"]
    assert timestamps.from_text(case["now"]) == NOW
