"""`make demo`: one job from `kubectl apply` to weights in a bucket, its pod deleted in the middle.

Everything is real: API server, scheduler, kubelets, containers, S3. Only the model is tiny and the GPUs are missing.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from testkit import installation
from testkit.cluster import ClusterHandle, LocalCluster
from testkit.kube import Object
from testkit.s3 import S3Server
from testkit.waiting import wait_until

NAMESPACE = "team-a"
EXAMPLE = installation.ROOT / "examples" / "minimal.yaml"
JOB = "cats"
UNDISTURBED = "cats-undisturbed"


def main() -> int:
    """Run the demo; return the exit code."""
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diffusion-demo-")))
        say("starting Kubernetes: etcd, control plane and four nodes with kubelet, containerd and CNI of their own")
        cluster = stack.enter_context(LocalCluster())
        print(cluster.kubectl("get", "nodes", "-L", "nvidia.com/gpu.product"))
        say("starting an S3 server; putting a tiny Stable Diffusion model and 12 captioned images into it")
        s3 = stack.enter_context(S3Server(address=cluster.host_ip, buckets=installation.BUCKETS))
        installation.stock(s3, work)
        say("installing the operator (kubectl apply of crds/, profiles and examples/install/operator.yaml)")
        installation.install(cluster)
        print(cluster.kubectl("get", "trainingprofiles"))
        prepare_team(cluster, s3)
        run(cluster, "kubectl apply -f examples/minimal.yaml", "apply", "-n", NAMESPACE, "-f", EXAMPLE)
        interrupt(cluster)
        finish(cluster, JOB)
        say("the same job again, undisturbed, to compare")
        cluster.apply(undisturbed(), namespace=NAMESPACE)
        finish(cluster, UNDISTURBED)
        return report(cluster, s3)


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def run(cluster: ClusterHandle, shown: str, *arguments: str | Path) -> None:
    """Run kubectl and show the command as a user would type it."""
    print(f"\n$ {shown}", flush=True)
    print(cluster.kubectl(*arguments), flush=True)


def prepare_team(cluster: ClusterHandle, s3: S3Server) -> None:
    """Make the team's namespace, with Pod Security enforced, and its Secret."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    cluster.apply(installation.secret("team-a-s3", s3.credentials), namespace=NAMESPACE)


def undisturbed() -> str:
    """Return the example under another name and destination."""
    job = yaml.safe_load(EXAMPLE.read_text())
    job["metadata"]["name"] = UNDISTURBED
    job["spec"]["output"]["destination"] = "s3://team-a/models/cats-undisturbed/"
    return yaml.safe_dump(job)


def interrupt(cluster: ClusterHandle) -> None:
    """Delete the pod once the run is well under way."""
    say("watching until a third of the steps is done")

    def third(job: Object) -> bool:
        progress = progress_of(job)
        return bool(progress) and progress["step"] * 3 >= progress["totalSteps"]

    watch(cluster, JOB, third)
    run(
        cluster,
        f"kubectl delete pod {JOB}-1-0 --wait=false",
        "delete",
        "pod",
        f"{JOB}-1-0",
        "-n",
        NAMESPACE,
        "--wait=false",
    )


def finish(cluster: ClusterHandle, name: str) -> None:
    """Watch a job until it is complete."""
    watch(cluster, name, lambda found: found.get("status", {}).get("phase") == "Complete")
    cluster.kubectl("wait", "--for=condition=Complete", f"dtj/{name}", "-n", NAMESPACE, "--timeout=10s")


def watch(cluster: ClusterHandle, name: str, until: Any, *, timeout: float = 900) -> Object:
    """Print the job's line of `kubectl get dtj` whenever it changes, until the condition holds; raise when it fails."""
    began = time.monotonic()
    shown: list[str] = []

    def probe() -> Object | None:
        job = cluster.find("diffusiontrainingjobs.diffusion-operator.io", name, namespace=NAMESPACE) or {}
        status = job.get("status", {})
        line = f"{status.get('phase', '')}: {status.get('message', '')}"
        if shown[-1:] != [line]:
            shown.append(line)
            print(f"  {time.monotonic() - began:6.1f} s  {name}  {line}", flush=True)
        if status.get("phase") == "Failed":
            raise SystemExit(f"job {name} failed: {json.dumps(status, indent=1)}")
        return job if until(job) else None

    found = wait_until(probe, describe=f"job {name}", timeout=timeout, interval=0.2)
    return found or {}


def progress_of(job: Object) -> dict[str, Any]:
    """Return the job's progress, {} before there is any."""
    progress: dict[str, Any] = job.get("status", {}).get("progress") or {}
    return progress


def report(cluster: ClusterHandle, s3: S3Server) -> int:
    """Show what a user would look at, and compare the weights of both runs."""
    run(cluster, "kubectl get dtj -o wide", "get", "dtj", "-o", "wide", "-n", NAMESPACE)
    run(cluster, f"kubectl get events (of {JOB})", "get", "events", "-n", NAMESPACE, "--field-selector",
        f"involvedObject.name={JOB}", "--sort-by=.metadata.creationTimestamp")  # fmt: skip
    jobs = {name: cluster.get("diffusiontrainingjobs.diffusion-operator.io", name, namespace=NAMESPACE)
            for name in (JOB, UNDISTURBED)}  # fmt: skip
    status = jobs[JOB]["status"]
    say("attempts of the disturbed job")
    for attempt in reversed(status["attempts"]):
        print(f"  {attempt['number']}: {attempt.get('cause', 'running')}; steps {attempt.get('resumedFromStep', 0)} to "
              f"{attempt.get('reachedStep')}; {attempt.get('message', '')}")  # fmt: skip
    print(f"  counters: {json.dumps(status['counters'])}")
    say("in the bucket (look at it with any S3 client, or `aws s3 ls --recursive`)")
    for key, size in installation.listing(s3.credentials, "team-a", "models/cats/"):
        if "/cache/" not in key:
            print(f"  {size:>9}  s3://team-a/{key}")
    say("weights")
    hashes = {
        name: {file["name"]: file["sha256"] for file in job["status"]["output"]["files"]} for name, job in jobs.items()
    }
    for name, files in hashes.items():
        for file, digest in sorted(files.items()):
            print(f"  {digest}  {name}: {file}")
    equal = hashes[JOB] == hashes[UNDISTURBED]
    checks = {
        "two attempts": status["attempt"] == 2,
        "cause Preempted": status["attempts"][1].get("cause") == "Preempted",
        "failures: 0": status["counters"].get("failures", 0) == 0,
        "weights bit-equal to the undisturbed run": equal,
    }
    for what, holds in checks.items():
        print(f"  {'ok ' if holds else 'NOT'} {what}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
