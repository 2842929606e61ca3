"""From `kubectl apply` to the first pod, and from the pod's start to the first optimizer step, on the local cluster.

    python -m bench.whole_process [--runs 5]

Writes bench/results/whole-process.json. The figures hold for this machine and a tiny model: they say what the operator,
Kubernetes and the trainer's start cost, not what a GPU does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from diffusion_api import names
from testkit import installation
from testkit.cluster import ClusterHandle, LocalCluster
from testkit.demo import NAMESPACE, prepare_team
from testkit.s3 import S3Server
from testkit.waiting import wait_until

RESULTS = Path(__file__).parent / "results" / "whole-process.json"
JOBS = f"{names.JOB_PLURAL}.{names.GROUP}"


def main() -> int:
    """Measure and write the results; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        cluster = stack.enter_context(LocalCluster())
        s3 = stack.enter_context(S3Server(address=cluster.host_ip, buckets=installation.BUCKETS))
        installation.stock(s3, work)
        installation.install(cluster)
        prepare_team(cluster, s3)
        measured = [measure(cluster, f"bench-{number}") for number in range(runs)]
    result = {
        "what": "seconds, median and all runs, one job at a time",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "kopf", "kubernetes")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "figures": {
            name: {"median": round(statistics.median(values), 3), "runs": [round(value, 3) for value in values]}
            for name in measured[0]
            for values in [[run[name] for run in measured]]
        },
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def measure(cluster: ClusterHandle, name: str) -> dict[str, float]:
    """Run one short job; return the seconds between its milestones."""
    job = yaml.safe_load((installation.ROOT / "examples" / "minimal.yaml").read_text())
    job["metadata"]["name"] = name
    job["spec"]["output"]["destination"] = f"s3://team-a/bench/{name}/"
    job["spec"]["training"] = {"maxSteps": 3}
    applied = time.monotonic()
    cluster.apply(job, namespace=NAMESPACE)
    answered = time.monotonic()
    _await_pod(cluster, names.preflight_name(name, 0))
    looked = time.monotonic()
    pod = names.pod_name(name, 1, 0)
    _await_pod(cluster, pod)
    created = time.monotonic()
    started = cluster.wait_for(
        "pods", pod, lambda found: found["status"].get("containerStatuses", [{}])[0].get("state", {}).get("running"),
        namespace=NAMESPACE, timeout=120,
    )  # fmt: skip
    running = time.monotonic()
    address = f"http://{started['status']['podIP']}:{names.METRICS_PORT}{names.PROGRESS_PATH}"
    wait_until(lambda: first_step(address) or _done(cluster, name), describe="the first step", timeout=300)
    stepped = time.monotonic()
    cluster.wait_for(JOBS, name, lambda found: found["status"]["phase"] == "Complete", namespace=NAMESPACE, timeout=300)
    return {
        "kubectl apply itself": answered - applied,
        "kubectl apply to first pod (preflight) created": looked - applied,
        "preflight's pod created to training pod created": created - looked,
        "training pod created to container running": running - created,
        "container running to first step": stepped - running,
        "first step to Complete": time.monotonic() - stepped,
    }


def _await_pod(cluster: ClusterHandle, name: str) -> None:
    wait_until(
        lambda: cluster.find("pods", name, namespace=NAMESPACE), describe=f"pod {name}", timeout=60, interval=0.005
    )


def first_step(address: str) -> bool:
    """Return whether the trainer says that it has done a step."""
    try:
        with urllib.request.urlopen(address, timeout=1) as answer:
            report: dict[str, Any] = json.load(answer)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
    return bool((report.get("progress") or {}).get("step"))


def _done(cluster: ClusterHandle, name: str) -> bool:
    job = cluster.get(JOBS, name, namespace=NAMESPACE)
    if job.get("status", {}).get("phase") == "Failed":
        raise RuntimeError(f"job {name} failed: {job['status'].get('message')}")
    return bool(job.get("status", {}).get("phase") == "Complete")


if __name__ == "__main__":
    sys.exit(main())
