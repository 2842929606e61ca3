"""Whole jobs for the end to end tests: the minimal example, made small, and what can be asked of one that runs."""

from __future__ import annotations

import yaml

from diffusion_api import names
from testkit import installation
from testkit.kube import Kube, Object, condition

JOBS = f"{names.JOB_PLURAL}.{names.GROUP}"
STEPS = 90
"""Enough for a job to be still at work when it is disturbed, also on a fast machine."""


def small_job(name: str, team: str, **training: object) -> Object:
    """Return the minimal example, small enough for a test."""
    job: Object = yaml.safe_load((installation.ROOT / "examples" / "minimal.yaml").read_text())
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


def completed(cluster: Kube, name: str, team: str, *, timeout: float = 480) -> Object:
    """Wait until the job is complete and return it; fails at once where it has failed."""

    def ended(found: Object) -> bool:
        if condition(found, "Failed").get("status") == "True":
            raise AssertionError(f"job {name} failed: {condition(found, 'Failed')}")
        return condition(found, "Complete").get("status") == "True"

    return cluster.wait_for(JOBS, name, ended, namespace=team, timeout=timeout)


def hashes(job: Object) -> dict[str, str]:
    """Return the hash of each exported file but the card, which names the job's destination."""
    return {file["name"]: file["sha256"] for file in job["status"]["output"]["files"] if file["name"] != "README.md"}


def trains(cluster: Kube, name: str, team: str, *, attempt: int = 1) -> str:
    """Wait until an attempt has done a step and return its node.

    The log says so at once; the status, which is written at leisure, may come too late.
    """
    pod = f"{name}-{attempt}-0"
    cluster.wait_log(pod, f"/{STEPS} loss ", namespace=team, timeout=240)
    return str(cluster.get("pods", pod, namespace=team)["spec"]["nodeName"])
