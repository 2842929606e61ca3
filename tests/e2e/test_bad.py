"""Every bad job gets one clear message, from kubectl where the schema can know it, else on the object.

Each file in `bad/` says on top where it is found out (apply, Validated, Failed) and which texts the message holds:
field, value and remedy.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from diffusion_api import names
from testkit import installation
from testkit.kube import KubectlError, condition

JOBS = f"{names.JOB_PLURAL}.{names.GROUP}"


@dataclass(frozen=True)
class Bad:
    path: Path
    stage: str
    texts: tuple[str, ...]


def corpus():
    for path in sorted((Path(__file__).parent / "bad").glob("*.yaml")):
        lines = path.read_text().splitlines()
        stage = lines[0].removeprefix("# expect: ")
        yield Bad(path, stage, tuple(line.removeprefix("# text: ") for line in lines if line.startswith("# text: ")))


CORPUS = list(corpus())


def of_stage(stage):
    chosen = [bad for bad in CORPUS if bad.stage == stage]
    return pytest.mark.parametrize("bad", chosen, ids=lambda bad: bad.path.stem)


def check(message, bad):
    missing = [text for text in bad.texts if text not in message]
    assert not missing, f"{missing} not in: {message}"


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/pwned",)


@pytest.fixture(scope="module")
def stocked(platform):
    """Put what the bad jobs point to into the bucket."""
    client = installation.s3_client(platform.s3.credentials)

    def put(bucket, key, content):
        client.put_object(Bucket=bucket, Key=key, Body=content)

    put("team-a", "not-images/not-an-image.png", b"no image")
    put("team-a", "not-images/not-an-image.txt", b"a caption")
    put("team-a", "empty/readme.md", b"nothing to train on")
    image = client.get_object(Bucket="team-a", Key=platform.an_image)["Body"].read()
    put("team-a", "no-captions/one.png", image)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"], "_diffusers_version": "0.42.1"}
    put("models", "hostile/model_index.json", json.dumps(index).encode())
    put("models", "hostile/unet/config.json", json.dumps({"_class_name": "UNet2DConditionModel"}).encode())
    buffer = io.BytesIO()
    pickle.dump(Hostile(), buffer)
    put("models", "hostile/unet/diffusion_pytorch_model.bin", buffer.getvalue())
    return platform


@pytest.fixture(scope="module")
def failing(stocked, module_team):
    """All that fail in their preflight, created at once: their pods start side by side, and each is looked at then."""
    for bad in CORPUS:
        if bad.stage == "Failed":
            stocked.cluster.kubectl("apply", "-n", module_team, "-f", bad.path)
    return stocked.cluster


def name_of(bad):
    return yaml.safe_load(bad.path.read_text())["metadata"]["name"]


def test_there_are_enough_of_them():
    assert len(CORPUS) >= 20


@of_stage("apply")
def test_is_refused_by_kubectl_apply(platform, module_team, bad):
    with pytest.raises(KubectlError) as caught:
        platform.cluster.kubectl("apply", "-n", module_team, "-f", bad.path)
    check(str(caught.value), bad)


@of_stage("Validated")
def test_is_refused_by_the_operator_before_any_pod(platform, module_team, bad):
    cluster, name = platform.cluster, name_of(bad)
    cluster.kubectl("apply", "-n", module_team, "-f", bad.path)
    job = cluster.wait_for(
        JOBS, name, lambda found: condition(found, "Validated").get("status") == "False", namespace=module_team
    )
    check(condition(job, "Validated")["message"], bad)
    assert cluster.items("pods", namespace=module_team, labels=f"{names.LABEL_JOB_NAME}={name}") == []


@of_stage("Failed")
def test_fails_at_once_and_says_why(failing, module_team, bad):
    cluster, name, team = failing, name_of(bad), module_team
    job = cluster.wait_for(
        JOBS, name, lambda found: condition(found, "Failed").get("status") == "True", namespace=team, timeout=240
    )
    check(condition(job, "Failed")["message"], bad)
    assert job["status"]["attempt"] == 0, "it was found out before a GPU was asked for"
    assert condition(job, "PreflightPassed")["status"] == "False"
    pods = cluster.items("pods", namespace=team, labels=f"{names.LABEL_JOB_NAME}={name}")
    assert [pod["metadata"]["name"] for pod in pods] == [names.preflight_name(name, 0)], "no second try"
