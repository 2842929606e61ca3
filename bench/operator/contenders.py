"""The three that are compared, each told to do the same: one pod with one GPU for each job, nothing else.

All run as processes beside one API server, with the rights of an administrator, in the form in which their makers ship
them: with their webhooks, their own limits on requests, and the Job controller where they build on it.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffusion_api import names
from testkit import tools
from testkit.builders import make_job, make_profile
from testkit.controlplane import ControlPlane
from testkit.kube import Object, condition
from testkit.kwok import ENDS_AFTER
from testkit.operating import ROOT
from testkit.pki import Authority
from testkit.process import ServerProcess, flags, free_ports, listening
from testkit.waiting import wait_until

NAMESPACE = "bench"
ADMINISTRATORS = ["system:masters"]
SHORT = "1s"
"""How long the pod of a job runs that is to complete."""
JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
# Fixed in the code of Trainer, and the default of JobSet.
CERTIFICATES = Path("/tmp/k8s-webhook-server/serving-certs")
SYSTEM = "kubeflow-system"
TRAINER_SERVICE = "kubeflow-trainer-controller-manager"
POD: Object = {
    "restartPolicy": "Never",
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "containers": [
        {
            "name": "node",
            "image": "trainer",
            "resources": {
                "requests": {"cpu": "8", "memory": "64Gi"},
                "limits": {"nvidia.com/gpu": "1", "memory": "64Gi"},
            },
        }
    ],
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run training jobs."""

    name: str
    version: str
    path: str
    """Of the collection of its jobs."""
    job: Callable[[str, bool], Object]
    """(name, whether it is to complete soon) -> manifest."""
    pod_label: str
    """Label of a pod that names its job."""
    complete: Callable[[Object], bool]
    start: Callable[[], Any]
    """Context of its processes, by name."""
    users: tuple[str, ...]
    """Names under which its writes are counted."""
    leftovers: tuple[str, ...] = field(default=())
    """Collections that are emptied with its jobs, beside pods."""


def ours(plane: ControlPlane, folder: Path) -> Contender:
    """Return diffusion-operator. The preflight is off: the others have nothing like it."""

    @contextmanager
    def start() -> Iterator[dict[str, ServerProcess]]:
        crds = sorted((ROOT / "crds").glob("*.yaml"))
        _install(plane, [yaml.safe_load(crd.read_text()) for crd in crds])
        # As many pods on a node as it has GPUs, as with the others.
        profile = make_profile(perGpu={"ephemeralStorage": "20Gi"})
        plane.kube.apply({**profile, "metadata": {"name": profile["metadata"]["name"]}})
        environment = {
            "KUBECONFIG": str(plane.user_kubeconfig("bench-ours", groups=ADMINISTRATORS)),
            "DIFFUSION_OPERATOR_HTTP_PORT": "0",
            "DIFFUSION_OPERATOR_PREFLIGHT": "OFF",
        }
        process = ServerProcess([sys.executable, "-m", "diffusion_operator"], log=folder / "ours.log", env=environment)
        with _ending(process):
            _await(process, lambda: "started:" in process.log.read_text())
            yield {"diffusion-operator": process}

    def job(name: str, soon: bool) -> Object:
        marks = {"podOverrides": {"annotations": {ENDS_AFTER: SHORT}}} if soon else {}
        return {**make_job(**marks), "metadata": {"name": name}}

    return Contender(
        name="diffusion-operator",
        version="this commit",
        path=f"/apis/{names.API_VERSION}/namespaces/{NAMESPACE}/{names.JOB_PLURAL}",
        job=job,
        pod_label=names.LABEL_JOB_NAME,
        complete=lambda found: condition(found, "Complete").get("status") == "True",
        start=start,
        users=("bench-ours",),
    )


def jobset(plane: ControlPlane, folder: Path) -> Contender:
    """Return JobSet with the Job controller."""

    @contextmanager
    def start() -> Iterator[dict[str, ServerProcess]]:
        with ExitStack() as stack:
            yield {"jobset": stack.enter_context(_jobset_manager(plane, folder))}

    def job(name: str, soon: bool) -> Object:
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": name},
            "spec": {"replicatedJobs": [{"name": "node", "template": {"spec": _job_spec(soon=soon)}}]},
        }

    return Contender(
        name="JobSet",
        version=tools.TOOLS["jobset"].version,
        path=f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/jobsets",
        job=job,
        pod_label=JOBSET_LABEL,
        complete=lambda found: condition(found, "Completed").get("status") == "True",
        start=start,
        users=("bench-jobset", "bench-kcm"),
        leftovers=(f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs", f"/api/v1/namespaces/{NAMESPACE}/services"),
    )


def trainer(plane: ControlPlane, folder: Path) -> Contender:
    """Return Kubeflow Trainer with the JobSet and the Job controller that it builds on."""
    sets = jobset(plane, folder)

    @contextmanager
    def start() -> Iterator[dict[str, ServerProcess]]:
        with ExitStack() as stack:
            managers = {"jobset": stack.enter_context(_jobset_manager(plane, folder))}
            managers["trainer"] = stack.enter_context(_trainer_manager(plane, folder))
            yield managers

    def job(name: str, soon: bool) -> Object:
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": name},
            "spec": {"runtimeRef": {"name": _runtime_name(soon=soon)}},
        }

    return Contender(
        name="Kubeflow Trainer",
        version=tools.TOOLS["trainer"].version,
        path=f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs",
        job=job,
        pod_label=JOBSET_LABEL,
        complete=lambda found: condition(found, "Complete").get("status") == "True",
        start=start,
        users=("bench-trainer", *sets.users),
        leftovers=(sets.path, *sets.leftovers),
    )


def _job_spec(*, soon: bool) -> Object:
    marks = {"annotations": {ENDS_AFTER: SHORT}} if soon else {}
    return {"backoffLimit": 0, "template": {"metadata": marks, "spec": POD}}


def _runtime_name(*, soon: bool) -> str:
    return "bench-short" if soon else "bench-long"


def _runtime(*, soon: bool) -> Object:
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    replicated = {"name": "node", "template": {"metadata": step, "spec": _job_spec(soon=soon)}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": _runtime_name(soon=soon)},
        "spec": {"mlPolicy": {"numNodes": 1}, "template": {"spec": {"replicatedJobs": [replicated]}}},
    }


@contextmanager
def _jobset_manager(plane: ControlPlane, folder: Path) -> Iterator[ServerProcess]:
    components = tools.source("jobset") / "config" / "components"
    _install(plane, _documents(components / "crd" / "bases"))
    port, health, metrics = free_ports(3)
    authority = _certify(folder)
    configuration = {
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "webhook": {"port": port, "certDir": str(CERTIFICATES)},
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": f"127.0.0.1:{metrics}"},
    }
    file = folder / "jobset.yaml"
    file.write_text(yaml.safe_dump(configuration))
    kubeconfig = plane.user_kubeconfig("bench-jobset", groups=ADMINISTRATORS)
    command = [tools.binary("jobset"), *flags({"config": file, "kubeconfig": kubeconfig, "zap-log-level": "error"})]
    process = ServerProcess(command, log=folder / "jobset.log")
    with _ending(process):
        _await_port(process, port)
        webhooks = _documents(components / "webhook" / "manifests.yaml")
        only_of_sets = {"matchExpressions": [{"key": JOBSET_LABEL, "operator": "Exists"}]}
        for document in webhooks:
            # As the project's own kustomization has it: pods of others are none of its business.
            for hook in document["webhooks"]:
                if hook["rules"][0]["resources"] == ["pods"]:
                    hook["objectSelector"] = only_of_sets
        with _webhooks(plane, webhooks, prefix="jobset", port=port, authority=authority):
            yield process


@contextmanager
def _trainer_manager(plane: ControlPlane, folder: Path) -> Iterator[ServerProcess]:
    base = tools.source("trainer") / "manifests" / "base"
    crds = [crd for crd in _documents(base / "crds") if crd.get("kind") == "CustomResourceDefinition"]
    _install(plane, crds)
    port, health = free_ports(2)
    authority = _certify(folder)
    pair = {
        "ca.crt": authority.root.certificate,
        "ca.key": authority.root.key,
        "tls.crt": CERTIFICATES / "tls.crt",
        "tls.key": CERTIFICATES / "tls.key",
    }
    data = {name: base64.b64encode(file.read_bytes()).decode() for name, file in pair.items()}
    secret = {"name": "kubeflow-trainer-webhook-cert", "namespace": SYSTEM}
    plane.kube.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": secret, "data": data},
    )
    webhooks = list(_documents(base / "webhook" / "manifests.yaml"))
    webhooks[0]["metadata"]["name"] = "validator.trainer.kubeflow.org"
    kubeconfig = plane.user_kubeconfig("bench-trainer", groups=ADMINISTRATORS)
    options = {
        "kubeconfig": kubeconfig,
        "webhook-server-port": port,
        "health-probe-bind-address": f"127.0.0.1:{health}",
        "zap-log-level": "error",
    }
    # Its certificates are looked after by itself: it waits until it finds its webhooks.
    with _webhooks(plane, webhooks, prefix="", port=port, authority=authority):
        process = ServerProcess([tools.binary("trainer"), *flags(options)], log=folder / "trainer.log")
        with _ending(process):
            _await_port(process, port)
            for runtime in (_runtime(soon=True), _runtime(soon=False)):
                plane.kube.apply(runtime)
            yield process


def _certify(folder: Path) -> Authority:
    """Put a certificate for this machine where the managers look for theirs; return who issued it."""
    authority = Authority(folder / "webhooks", names=["DNS:kubeflow-trainer-ca"], rsa=True)
    if not (CERTIFICATES / "tls.crt").exists() or not (folder / "webhooks" / "server.crt").exists():
        host = f"DNS:{TRAINER_SERVICE}.{SYSTEM}.svc"
        pair = authority.issue("server", subject="/CN=webhooks", names=[host, "IP:127.0.0.1"])
        CERTIFICATES.mkdir(parents=True, exist_ok=True)
        shutil.copy(pair.certificate, CERTIFICATES / "tls.crt")
        shutil.copy(pair.key, CERTIFICATES / "tls.key")
        shutil.copy(authority.root.certificate, CERTIFICATES / "ca.crt")
    return authority


@contextmanager
def _webhooks(
    plane: ControlPlane, documents: list[Object], *, prefix: str, port: int, authority: Authority
) -> Iterator[None]:
    bundle = base64.b64encode(authority.root.certificate.read_bytes()).decode()
    kinds = {"MutatingWebhookConfiguration": "mutating", "ValidatingWebhookConfiguration": "validating"}
    made = []
    for document in documents:
        if prefix:
            document["metadata"]["name"] = f"{prefix}-{document['metadata']['name']}"
        for hook in document["webhooks"]:
            path = hook["clientConfig"]["service"]["path"]
            hook["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": bundle}
        plane.kube.apply(document)
        made.append((f"{kinds[document['kind']]}webhookconfigurations", document["metadata"]["name"]))
    try:
        yield
    finally:
        for kind, name in made:
            plane.kube.api.delete(kind, name)


def _install(plane: ControlPlane, crds: list[Object]) -> None:
    # The schemas are larger than what the client-side form of apply can keep in an annotation.
    text = "\n---\n".join(json.dumps(crd) for crd in crds)
    plane.kube.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=text)
    plane.kube.wait_established(*(crd["metadata"]["name"] for crd in crds))


def _documents(path: Path) -> list[Object]:
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    return [document for file in files for document in yaml.safe_load_all(file.read_text()) if document]


@contextmanager
def _ending(process: ServerProcess) -> Iterator[None]:
    try:
        yield
    finally:
        process.stop()


def _await_port(process: ServerProcess, port: int) -> None:
    _await(process, lambda: listening("127.0.0.1", port))


def _await(process: ServerProcess, ready: Callable[[], bool]) -> None:
    def probe() -> bool:
        process.check()
        return ready()

    wait_until(probe, describe=process.name, timeout=120, detail=process.tail)


def descendants(process: ServerProcess) -> list[int]:
    """Return the ids of a server's processes: below the shell that guards it."""
    found, unseen = [], [process.pid]
    while unseen:
        parent = unseen.pop()
        for task in Path(f"/proc/{parent}/task").iterdir():
            children = (task / "children").read_text().split()
            found += map(int, children)
            unseen += map(int, children)
    return found
