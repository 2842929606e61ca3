"""The real operator beside a real API server, with nobody else: the test plays scheduler, kubelet and user.

The operator runs as a process of its own, with the rights of the shipped manifest and no more. Processes are forked
from one that has imported everything already, so that starting one costs a twentieth of a second and not two.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import yaml

from diffusion_api import names
from testkit.builders import make_profile
from testkit.controlplane import ControlPlane
from testkit.kube import Kube, Object
from testkit.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "examples" / "install" / "operator.yaml"
JOBS = names.JOB_PLURAL
AUDIT_POLICY = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
    userGroups: ["system:serviceaccounts"]
  - level: None
"""

_processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Installation:
    """An API server with our kinds, the operator's rights, and a profile."""

    kube: Kube
    kubeconfig: Path
    """The operator's: its service account's token."""
    stranger: Path
    """A kubeconfig of a service account without rights."""
    audit_log: Path
    folder: Path

    def audit(self, namespace: str, *, verbs: tuple[str, ...]) -> list[Object]:
        """Return what the operator asked for in a namespace, from the API server's own log."""
        entries = [json.loads(line) for line in self.audit_log.read_text().splitlines()]
        mine = [entry for entry in entries if entry.get("objectRef", {}).get("namespace") == namespace]
        return [entry for entry in mine if entry["verb"] in verbs]


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[Installation]:
    """Start an API server and install everything of the manifest but the Deployment."""
    policy, log = folder / "policy.yaml", folder / "audit.log"
    policy.write_text(AUDIT_POLICY)
    options = {"audit-policy-file": policy, "audit-log-path": log, "audit-log-mode": "blocking"}
    with ControlPlane(options=options) as plane:
        kube = plane.kube
        kube.kubectl("apply", "--server-side", *(part for crd in _crds() for part in ("-f", crd)))
        kube.wait_established(*(f"{crd.stem}.{names.GROUP}" for crd in _crds()))
        documents = [item for item in yaml.safe_load_all(MANIFEST.read_text()) if item["kind"] != "Deployment"]
        kube.apply(*documents)
        account = next(item["metadata"] for item in documents if item["kind"] == "ServiceAccount")
        profile = make_profile()
        kube.apply({**profile, "metadata": {"name": profile["metadata"]["name"]}})
        kubeconfig = plane.service_account_kubeconfig(account["name"], namespace=account["namespace"])
        stranger = plane.service_account_kubeconfig("stranger", namespace="default")
        yield Installation(kube=kube, kubeconfig=kubeconfig, stranger=stranger, audit_log=log, folder=folder)


def _crds() -> list[Path]:
    return sorted((ROOT / "crds").glob("*.yaml"))


class OperatorProcess:
    """One run of the operator; ended by `stop`, by a failpoint, or with the test."""

    _count = 0

    def __init__(self, installation: Installation, *, namespace: str = "", **settings: str) -> None:
        """`settings` are the variables DIFFUSION_OPERATOR_<NAME>, and `failpoint`."""
        OperatorProcess._count += 1
        self.log = installation.folder / f"operator-{OperatorProcess._count}.log"
        failpoint = settings.pop("failpoint", "")
        environment = {
            "KUBECONFIG": str(installation.kubeconfig),
            names.ENV_FAILPOINT: failpoint,
            "DIFFUSION_OPERATOR_HTTP_PORT": "0",
            "DIFFUSION_OPERATOR_PREFLIGHT": "OFF",
            "DIFFUSION_OPERATOR_LOG_LEVEL": "DEBUG",
            "DIFFUSION_OPERATOR_NAMESPACES": namespace,
            **{f"DIFFUSION_OPERATOR_{name.upper()}": value for name, value in settings.items()},
        }
        _processes.set_forkserver_preload(["diffusion_operator.__main__"])
        self.log.touch()
        self._process = _processes.Process(target=_run, args=(environment, str(self.log)), daemon=True)
        self._process.start()
        self.wait_started()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def wait_started(self) -> None:
        """Wait until it has read the cluster or stands by, or has ended before (a failpoint may lie before that)."""

        def started() -> bool:
            log = self.log.read_text()
            return not self.running or "started:" in log or "standing by as" in log

        wait_until(started, describe="a start", timeout=120, detail=self.tail)

    def stop(self) -> int:
        """End it as Kubernetes does, by SIGTERM; return its exit code."""
        self._process.terminate()
        return self.wait()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.wait()

    def pause(self) -> None:
        """Stop it in its tracks, as a node does that hangs; `resume` ends it."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def pid(self) -> int:
        """Its process id."""
        if self._process.pid is None:
            raise RuntimeError("the operator was never started")
        return self._process.pid

    def wait(self, timeout: float = 120) -> int:
        """Wait for its end; return its exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"the operator did not end within {timeout:g} s; its log:\n{self.tail()}")
        return self._process.exitcode

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text()[-6000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()


def _run(environment: Mapping[str, str], log: str) -> None:
    """Be the operator. Runs in the forked process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from diffusion_operator.__main__ import main

    sys.exit(main([]))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Kubelet:
    """What happens to pods in one namespace."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self._kube = kube
        self.namespace = namespace

    def wait_for_pod(self, name: str) -> Object:
        """Wait until the operator has created the pod."""
        return self._kube.wait_for("pods", name, lambda _pod: True, namespace=self.namespace)

    def bind(self, name: str, *, node: str = "node-1") -> None:
        """Give the pod a node, as the scheduler does."""
        body = {"metadata": {"name": name}, "target": {"kind": "Node", "name": node}}
        self._kube.api.create("pods", body, namespace=self.namespace, subresource="binding")

    def run(self, name: str, *, address: str | None = None, node: str = "node-1") -> None:
        """Wait for the pod and let it run."""
        pod = self.wait_for_pod(name)
        if not pod["spec"].get("nodeName"):
            self.bind(name, node=node)
        started = {"startTime": "2026-01-02T03:04:05Z", "podIP": address} if address else {}
        self.patch(name, phase="Running", **started)

    def end(self, name: str, exit_code: int, *, message: str = "", reason: str = "", **status: Any) -> None:
        """Let the pod's container end."""
        state = {"exitCode": exit_code, "message": message, "reason": reason or "Error"}
        container = {
            "name": names.TRAINER_CONTAINER,
            "image": "trainer",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": state},
        }
        phase = "Failed" if exit_code else "Succeeded"
        self.patch(name, phase=phase, containerStatuses=[container], **status)

    def patch(self, name: str, **status: Any) -> None:
        """Merge into the pod's status."""
        self._kube.api.patch("pods", name, {"status": status}, namespace=self.namespace, subresource="status")

    def tell(self, name: str, reason: str, message: str) -> None:
        """Warn of something in an event about the pod, now: what is old is no news."""
        pod = self._kube.get("pods", name, namespace=self.namespace)["metadata"]
        about = {"kind": "Pod", "name": name, "namespace": self.namespace, "uid": pod["uid"]}
        said = {"reason": reason, "type": "Warning", "message": message, "involvedObject": about}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        event = {"metadata": {"name": f"{name}-{reason.lower()}"}, "lastTimestamp": now, **said}
        self._kube.api.create("events", event, namespace=self.namespace)

    def remove(self, name: str) -> None:
        """Let the pod go, as at the end of its deletion."""
        self._kube.api.delete("pods", name, namespace=self.namespace, grace_seconds=0)


class User:
    """What somebody does with jobs in one namespace."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self._kube = kube
        self.namespace = namespace

    def create(self, job: Object) -> None:
        """Create the job (of `make_job`)."""
        metadata = {"name": job["metadata"]["name"]}
        self._kube.api.create(JOBS, {**job, "metadata": metadata}, namespace=self.namespace)

    def change(self, name: str, **spec: Any) -> None:
        """Merge into the job's spec."""
        self._kube.api.patch(JOBS, name, {"spec": spec}, namespace=self.namespace)

    def job(self, name: str = "cats") -> Object:
        """Return the job."""
        return self._kube.get(JOBS, name, namespace=self.namespace)

    def wait_phase(self, phase: str, name: str = "cats", *, attempt: int | None = None) -> Object:
        """Wait until the job is in the phase (and attempt); return its status."""

        def reached(job: Object) -> bool:
            status = job.get("status", {})
            return status.get("phase") == phase and attempt in {None, status.get("attempt")}

        what = f"phase {phase}"
        found = self._kube.wait_for(JOBS, name, reached, namespace=self.namespace, timeout=120, describe=what)
        status: Object = found["status"]
        return status

    def reasons(self) -> list[str]:
        """Return the reasons of all events about jobs, sorted."""
        events = self._kube.items("events", namespace=self.namespace)
        return sorted(event["reason"] for event in events if event["involvedObject"]["kind"] == names.JOB_KIND)
