"""Whole jobs on the real cluster: operator in the cluster, real pods, real S3."""

from __future__ import annotations

import pytest
import yaml

from diffusion_api import names
from testkit import installation
from testkit.kube import condition

JOBS = f"{names.JOB_PLURAL}.{names.GROUP}"
STEPS = 150
"""Enough for a job to be still at work when it is disturbed, also on a fast machine."""


def small_job(name, team, **training):
    """Return the minimal example, small enough for a test."""
    job = yaml.safe_load((installation.ROOT / "examples" / "minimal.yaml").read_text())
    job["metadata"]["name"] = name
    spec = job["spec"]
    spec["output"]["destination"] = f"s3://team-a/{team}/{name}/"
    spec["dataset"] |= {"resolution": 64, "filters": {"minSide": 32}}
    spec["training"] = {"maxSteps": STEPS, "batchSize": 2} | training
    spec["checkpoint"] = {"interval": "20steps"}
    spec["validation"] = {
        "everySteps": STEPS // 2,
        "prompts": [{"prompt": "a cat", "negativePrompt": "blurry", "steps": 3}],
    }
    return job


def completed(cluster, name, team):
    def ended(found):
        assert condition(found, "Failed").get("status") != "True", condition(found, "Failed")
        return condition(found, "Complete").get("status") == "True"

    return cluster.wait_for(JOBS, name, ended, namespace=team, timeout=240)


def hashes(job):
    return {file["name"]: file["sha256"] for file in job["status"]["output"]["files"]}


def running(cluster, name, team):
    """Wait for the first step. The log says so at once; the status, which is written at leisure, may come too late."""
    cluster.wait_log(f"{name}-1-0", f"step 1/{STEPS}", namespace=team, timeout=120)


@pytest.fixture(scope="module")
def undisturbed(platform, module_team):
    """A job that nothing happens to."""
    cluster = platform.cluster
    cluster.apply(small_job("undisturbed", module_team), namespace=module_team)
    return completed(cluster, "undisturbed", module_team)


def test_a_job_leaves_weights_samples_and_curves_in_the_bucket(platform, module_team, undisturbed):
    prefix = f"{module_team}/undisturbed/"
    keys = [key.removeprefix(prefix) for key, _ in installation.listing(platform.s3.credentials, "team-a", prefix)]
    assert "diffusers/pytorch_lora_weights.safetensors" in keys
    assert any(key.startswith("kohya/") and key.endswith(".safetensors") for key in keys)
    assert any(key.startswith("samples/") and key.endswith(".png") for key in keys)
    assert "metrics.jsonl" in keys
    status = undisturbed["status"]
    assert status["progress"]["step"] == status["progress"]["totalSteps"] == STEPS
    assert status["counters"].get("failures", 0) == 0


@pytest.mark.usefixtures("undisturbed")
def test_kubectl_says_what_a_user_wants_to_know(platform, module_team):
    kubectl = platform.cluster.kubectl
    lines = kubectl("get", "dtj", "-n", module_team).splitlines()
    assert lines[0].split() == ["NAME", "PHASE", "PROGRESS", "ETA", "GPUS", "RESTARTS", "AGE"]
    assert "Complete" in lines[1]
    assert "100%" in lines[1]
    wide = kubectl("get", "dtj", "-o", "wide", "-n", module_team).splitlines()[0]
    assert wide.split()[-4:] == ["PROFILE", "LOSS", "QUEUE", "MESSAGE"]
    assert "Peak learning rate" in kubectl("explain", "dtj.spec.training.learningRate")
    kubectl("wait", "--for=condition=Complete", "dtj/undisturbed", "-n", module_team, "--timeout=5s")
    selected = kubectl("get", "dtj", "-n", module_team, "--field-selector", "status.phase=Complete", "-o", "name")
    assert "undisturbed" in selected
    assert "step" in kubectl("logs", "-l", f"{names.LABEL_JOB_NAME}=undisturbed", "-n", module_team, "--tail=50")
    events = kubectl("get", "events", "-n", module_team, "--field-selector", "involvedObject.name=undisturbed")
    assert "Complete" in events


def test_a_deleted_pod_costs_nothing(platform, module_team, undisturbed):
    cluster = platform.cluster
    cluster.apply(small_job("preempted", module_team), namespace=module_team)
    running(cluster, "preempted", module_team)
    cluster.kubectl("delete", "pod", "preempted-1-0", "-n", module_team, "--wait=false")
    job = completed(cluster, "preempted", module_team)
    status = job["status"]
    assert status["attempt"] == 2
    assert status["attempts"][1]["cause"] == "Preempted"
    assert status["counters"] | {"failures": 0} == status["counters"]
    assert status["counters"]["preemptions"] == 1
    assert hashes(job) == hashes(undisturbed)


@pytest.mark.usefixtures("platform")
def test_a_lost_node_costs_nothing(cluster, module_team, undisturbed):
    cluster.apply(small_job("node-lost", module_team), namespace=module_team)
    running(cluster, "node-lost", module_team)
    node = cluster.get("pods", "node-lost-1-0", namespace=module_team)["spec"]["nodeName"]
    cluster.lose_node(node)
    job = completed(cluster, "node-lost", module_team)
    assert job["status"]["attempts"][1]["cause"] in {"NodeLost", "Preempted"}
    assert job["status"]["counters"].get("failures", 0) == 0
    assert hashes(job) == hashes(undisturbed)


def test_suspend_saves_and_resume_continues(platform, module_team, undisturbed):
    cluster = platform.cluster
    cluster.apply(small_job("suspended", module_team), namespace=module_team)
    running(cluster, "suspended", module_team)
    suspend = ("patch", "dtj", "suspended", "-n", module_team, "--type=merge", "-p")
    cluster.kubectl(*suspend, '{"spec":{"suspend":true}}')
    cluster.kubectl("wait", "--for=condition=Suspended", "dtj/suspended", "-n", module_team, "--timeout=60s")
    cluster.wait_gone("pods", "suspended-1-0", namespace=module_team)
    cluster.kubectl(*suspend, '{"spec":{"suspend":false}}')
    job = completed(cluster, "suspended", module_team)
    assert job["status"]["counters"].get("failures", 0) == 0
    assert hashes(job) == hashes(undisturbed)


def test_the_operator_may_die_while_a_job_runs(platform, module_team, undisturbed):
    cluster = platform.cluster
    cluster.apply(small_job("orphan", module_team), namespace=module_team)
    running(cluster, "orphan", module_team)
    cluster.kubectl("delete", "pods", "--all", "-n", platform.operator_namespace, "--grace-period=0", "--force")
    job = completed(cluster, "orphan", module_team)
    assert job["status"]["attempt"] == 1
    assert hashes(job) == hashes(undisturbed)


def test_a_missing_secret_is_waited_for_and_named(platform, team):
    cluster = platform.cluster
    job = small_job("no-secret", team)
    job["spec"]["credentials"]["secretRef"]["name"] = "later"
    cluster.apply(job, namespace=team)
    found = cluster.wait_for(
        JOBS,
        "no-secret",
        lambda found: (found.get("status", {}).get("pending") or {}).get("cause") == "MissingSecret",
        namespace=team,
        timeout=90,
    )
    assert "later" in found["status"]["pending"]["detail"] + found["status"]["pending"]["hint"]
    cluster.apply(installation.secret("later", platform.s3.credentials), namespace=team)
    # The kubelet tries to mount again after a pause that grows to two minutes.
    assert completed(cluster, "no-secret", team)["status"]["attempt"] == 1
