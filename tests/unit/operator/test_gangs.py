"""The jobs of docs/guides/queues.md are valid; their pods say what Kueue, Volcano, coscheduling and KAI look for."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from diffusion_api import names
from testkit.builders import Object, make_job, merge
from testkit.deciding import ask

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs" / "guides" / "queues.md").read_text()
GOLDEN = Path(__file__).parent / "golden" / "gangs.yaml"
AUTOSCALERS = ("karpenter.sh/", "cluster-autoscaler.kubernetes.io/")
OWN = ("app.kubernetes.io/", f"{names.GROUP}/", "kubectl.kubernetes.io/", *AUTOSCALERS)
SPEC = ("schedulerName", "hostname", "subdomain")


def example(title: str) -> list[Object]:
    block = re.search(rf"^## {title}\n.*?^```yaml\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    return list(yaml.safe_load_all(block[1]))


def pods(title: str) -> list[Object]:
    job = merge(example(title)[-1], {"metadata": {"uid": make_job()["metadata"]["uid"], "generation": 1}})
    return [made for made in ask(job).create if made["kind"] == "Pod"]


def said(pod: Object) -> Object:
    """Return what the pod says to schedulers and queues."""
    metadata, spec = pod["metadata"], pod["spec"]
    own = lambda marks: {key: value for key, value in marks.items() if not key.startswith(OWN)}  # noqa: E731
    return {
        "labels": own(metadata["labels"]),
        "annotations": own(metadata["annotations"]),
        **{key: spec[key] for key in SPEC if key in spec},
    }


@pytest.mark.parametrize("title", ["Kueue", "Volcano", "Coscheduling", "KAI"])
def test_every_pod_says_what_the_scheduler_looks_for(title: str) -> None:
    found = {pod["metadata"]["name"]: said(pod) for pod in pods(title)}
    golden = yaml.safe_load(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(yaml.safe_dump(golden | {title: found}))
        golden[title] = found
    assert found == golden[title]
    assert list(found) == ["cats-1-0", "cats-1-1"]


@pytest.mark.parametrize(("title", "key"), [("Volcano", "annotations"), ("Coscheduling", "labels")])
def test_the_pod_group_is_the_one_that_the_pods_name_and_as_large(title: str, key: str) -> None:
    group, job = example(title)
    for pod in pods(title):
        assert group["metadata"]["name"] in said(pod)[key].values()
    assert group["spec"]["minMember"] == job["spec"]["resources"]["nodes"]


def test_kueue_and_another_scheduler_go_together() -> None:
    job = merge(make_job(metadata={"labels": {names.LABEL_QUEUE: "main"}}), {"spec": example("KAI")[-1]["spec"]})
    for pod in (made for made in ask(job).create if made["kind"] == "Pod"):
        assert pod["spec"]["schedulerName"] == "kai-scheduler"
        assert {names.LABEL_QUEUE, names.LABEL_POD_GROUP, "kai.scheduler/queue"} <= set(pod["metadata"]["labels"])
