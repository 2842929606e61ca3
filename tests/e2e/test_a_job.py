"""A job that nothing happens to: what it leaves in the bucket, and what kubectl says of it.

Its name makes it run before the tests that lose nodes, whose pods' logs go with them.
"""

from __future__ import annotations

from diffusion_api import names
from testkit import installation
from testkit.jobs import STEPS


def test_a_job_leaves_weights_samples_and_curves_in_the_bucket(platform, undisturbed):
    prefix = f"{undisturbed['metadata']['namespace']}/undisturbed/"
    keys = [key.removeprefix(prefix) for key, _ in installation.listing(platform.s3.credentials, "team-a", prefix)]
    assert "diffusers/pytorch_lora_weights.safetensors" in keys
    assert any(key.startswith("kohya/") and key.endswith(".safetensors") for key in keys)
    assert any(key.startswith("samples/") and key.endswith(".png") for key in keys)
    assert "metrics.jsonl" in keys
    status = undisturbed["status"]
    assert status["progress"]["step"] == status["progress"]["totalSteps"] == STEPS
    assert status["counters"].get("failures", 0) == 0


def test_kubectl_says_what_a_user_wants_to_know(platform, undisturbed):
    kubectl, team = platform.cluster.kubectl, undisturbed["metadata"]["namespace"]
    lines = kubectl("get", "dtj", "-n", team).splitlines()
    assert lines[0].split() == ["NAME", "PHASE", "PROGRESS", "ETA", "GPUS", "RESTARTS", "AGE"]
    assert "Complete" in lines[1]
    assert "100%" in lines[1]
    wide = kubectl("get", "dtj", "-o", "wide", "-n", team).splitlines()[0]
    assert wide.split()[-4:] == ["PROFILE", "LOSS", "QUEUE", "MESSAGE"]
    assert "Peak learning rate" in kubectl("explain", "dtj.spec.training.learningRate")
    kubectl("wait", "--for=condition=Complete", "dtj/undisturbed", "-n", team, "--timeout=5s")
    selected = kubectl("get", "dtj", "-n", team, "--field-selector", "status.phase=Complete", "-o", "name")
    assert "undisturbed" in selected
    assert "step" in kubectl("logs", "-l", f"{names.LABEL_JOB_NAME}=undisturbed", "-n", team, "--tail=50")
    events = kubectl("get", "events", "-n", team, "--field-selector", "involvedObject.name=undisturbed")
    assert "Complete" in events
