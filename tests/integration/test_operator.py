"""The operator on a real API server, with its own rights: one job's whole life, and what can come in between."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import pytest
import yaml

from diffusion_api import names
from diffusion_api.run import RunConfig
from testkit.builders import last_word, make_checkpoint, make_job, make_profile, make_progress, make_report
from testkit.kube import Object, condition
from testkit.kubeapi import ApiError
from testkit.operating import JOBS, MANIFEST, Installation, Kubelet, OperatorProcess, User, installed
from testkit.process import free_ports
from testkit.waiting import wait_until

pytestmark = pytest.mark.apiserver

(PORT,) = free_ports(1)
"""The operator's HTTP port."""


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("operator")) as found:
        settings = {"progress_seconds": "0.2", "http_address": "127.0.0.1", "http_port": str(PORT)}
        with OperatorProcess(found, **settings):
            yield found


@pytest.fixture
def place(installation: Installation, request: pytest.FixtureRequest) -> Iterator[tuple[User, Kubelet]]:
    with installation.kube.namespace(request.node.originalname) as name:
        yield User(installation.kube, name), Kubelet(installation.kube, name)


Place = tuple[User, Kubelet]


def causes(status: Object) -> list[tuple[int, str | None]]:
    return [(attempt["number"], attempt.get("cause")) for attempt in status["attempts"]]


class Trainer:
    """A trainer's HTTP server: says what the test tells it to. Each has a loopback address of its own."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.report = make_report(0, stage="Preparing", progress=None, detail="encoding images 3/12")
        trainer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = trainer.report.model_dump_json(by_alias=True).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
                pass

        self.server = ThreadingHTTPServer((address, names.METRICS_PORT), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_a_whole_life(place: Place, installation: Installation) -> None:
    user, kubelet = place
    user.create(make_job())
    pod = kubelet.wait_for_pod("cats-1-0")
    run = RunConfig.model_validate_json(pod["metadata"]["annotations"][names.ANNOTATION_RUN])
    assert (run.job.uid, run.attempt) == (user.job()["metadata"]["uid"], 1)
    assert user.wait_phase("Scheduling")["gpus"] == 1
    with Trainer("127.9.0.1") as trainer:
        kubelet.run("cats-1-0", address=trainer.address)
        status = user.wait_phase("Preparing")
        installation.kube.wait_for(
            JOBS, "cats", lambda job: job["status"]["message"] == "encoding images 3/12", namespace=user.namespace
        )
        progress = make_progress(900, loss=0.08, estimated_remaining_seconds=2460)
        trainer.report = make_report(900, progress=progress, latest_checkpoint=make_checkpoint(800))
        status = user.wait_phase("Running")
        assert (status["progress"]["done"], status["progress"]["remaining"]) == ("45%", "41m")
        assert status["checkpoint"]["latest"]["step"] == 800
        assert condition(user.job(), "PodsReady")["status"] == "True"
    word = last_word(0, message="done", step=2000, progress=make_progress(2000))
    kubelet.end("cats-1-0", 0, message=word)
    status = user.wait_phase("Complete")
    assert causes(status) == [(1, "Completed")]
    assert (status["progress"]["done"], status["message"], status["attempts"][0]["nodes"]) == (
        "100%",
        "done",
        ["node-1"],
    )
    shown = installation.kube.kubectl(
        "wait", "dtj/cats", "--for=condition=Complete", "-n", user.namespace, "--timeout=5s"
    )
    assert "condition met" in shown
    wanted = ["AttemptStarted", "Complete", "Running", "Validated"]
    wait_until(lambda: user.reasons() == wanted, describe=f"events {wanted}", detail=lambda: str(user.reasons()))
    assert installation.kube.find("pods", "cats-1-0", namespace=user.namespace), "the last pod is kept for its log"


def test_two_nodes_start_and_end_together(place: Place, installation: Installation) -> None:
    user, kubelet = place
    user.create(make_job(resources={"nodes": 2}))
    for pod in ("cats-1-0", "cats-1-1"):
        kubelet.wait_for_pod(pod)
    service = installation.kube.get("services", "cats", namespace=user.namespace)
    assert service["metadata"]["ownerReferences"][0]["uid"] == user.job()["metadata"]["uid"]
    kubelet.run("cats-1-0", node="node-2")
    kubelet.run("cats-1-1", node="node-1")
    user.wait_phase("Preparing")
    kubelet.end("cats-1-1", 80, message=last_word(80, message="no memory"))
    installation.kube.wait_for(
        "pods", "cats-1-0", lambda pod: "deletionTimestamp" in pod["metadata"], namespace=user.namespace
    )
    kubelet.end("cats-1-0", 81, message=last_word(81, message="lost the other"))
    kubelet.wait_for_pod("cats-2-0")
    kubelet.wait_for_pod("cats-2-1")
    newest, ended = user.job()["status"]["attempts"]
    assert (newest["number"], ended["cause"], ended["nodes"]) == (2, "CudaOutOfMemory", ["node-2", "node-1"])


def test_preemption_costs_nothing(place: Place, installation: Installation) -> None:
    user, kubelet = place
    user.create(make_job(runPolicy={"backoffLimit": 0}))
    kubelet.run("cats-1-0")
    user.wait_phase("Preparing")
    disruption = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "room"}
    kubelet.patch("cats-1-0", conditions=[disruption])
    installation.kube.api.delete("pods", "cats-1-0", namespace=user.namespace)
    user.wait_phase("Interrupted")
    assert installation.kube.find("pods", "cats-2-0", namespace=user.namespace) is None, "two attempts at once"
    kubelet.end("cats-1-0", 75, message=last_word(75, step=700, latest_checkpoint=make_checkpoint(700)))
    kubelet.remove("cats-1-0")
    kubelet.run("cats-2-0")
    status = user.wait_phase("Preparing", attempt=2)
    assert causes(status) == [(2, None), (1, "Preempted")]
    assert (status["counters"]["failures"], status["counters"]["preemptions"]) == (0, 1)
    assert status["checkpoint"]["latest"]["step"] == 700
    assert "nextAttemptAt" not in status


def test_a_pod_that_vanishes_is_replaced(place: Place) -> None:
    user, kubelet = place
    user.create(make_job())
    kubelet.run("cats-1-0")
    user.wait_phase("Preparing")
    kubelet.remove("cats-1-0")
    kubelet.run("cats-2-0")
    assert causes(user.wait_phase("Preparing", attempt=2)) == [(2, None), (1, "Preempted")]


@pytest.mark.parametrize(
    ("code", "phase", "cause"),
    [
        (64, "Failed", "BadConfig"),
        (77, "Failed", "PermissionDenied"),
        (69, "Interrupted", "StorageUnavailable"),
        (83, "Interrupted", "Hang"),
        (1, "Interrupted", "Crash"),
    ],
)
def test_each_class_of_exit_codes(place: Place, code: int, phase: str, cause: str) -> None:
    user, kubelet = place
    user.create(make_job())
    kubelet.run("cats-1-0")
    kubelet.end("cats-1-0", code, message=last_word(code, message=f"this is {cause}", last_lines="Traceback"))
    status = user.wait_phase(phase)
    assert causes(status) == [(1, cause)]
    assert (status["attempts"][0]["exitCode"], status["attempts"][0]["lastLines"]) == (code, "Traceback")
    assert f"this is {cause}" in status["message"]
    assert ("nextAttemptAt" in status) == (phase == "Interrupted")
    assert status["counters"]["failures"] == (1 if cause == "Crash" else 0)


def test_out_of_gpu_memory_halves_the_micro_batch(place: Place) -> None:
    user, kubelet = place
    user.create(make_job(training={"batchSize": 8}))
    kubelet.run("cats-1-0")
    kubelet.end("cats-1-0", 80, message=last_word(80))
    pod = kubelet.wait_for_pod("cats-2-0")
    run = RunConfig.model_validate_json(pod["metadata"]["annotations"][names.ANNOTATION_RUN])
    assert (run.micro_batch_size, run.spec.training.batch_size) == (4, 8)


def test_suspend_and_resume(place: Place, installation: Installation) -> None:
    user, kubelet = place
    user.create(make_job())
    kubelet.run("cats-1-0")
    user.wait_phase("Preparing")
    user.change("cats", suspend=True)
    told = installation.kube.wait_for(
        "pods", "cats-1-0", lambda pod: "deletionTimestamp" in pod["metadata"], namespace=user.namespace
    )
    assert told["metadata"]["deletionGracePeriodSeconds"] == 120, "the trainer has its whole grace to save"
    kubelet.end("cats-1-0", 75, message=last_word(75, step=300))
    kubelet.remove("cats-1-0")
    status = user.wait_phase("Suspended")
    assert causes(status) == [(1, "Suspended")]
    assert condition(user.job(), "Suspended")["status"] == "True"
    assert status["counters"]["preemptions"] == 0
    user.change("cats", suspend=False)
    kubelet.run("cats-2-0")
    user.wait_phase("Preparing", attempt=2)
    assert condition(user.job(), "Suspended")["reason"] == "Resumed"
    wait_until(lambda: {"Suspended", "Resumed", "AttemptSuspended"} <= set(user.reasons()), describe="events")


def test_a_finished_job_is_deleted_when_its_time_is_over(place: Place, installation: Installation) -> None:
    user, kubelet = place
    user.create(make_job(runPolicy={"ttlSecondsAfterFinished": 1}))
    kubelet.run("cats-1-0")
    kubelet.end("cats-1-0", 0, message=last_word(0))
    wait_until(lambda: installation.kube.find(JOBS, "cats", namespace=user.namespace) is None, describe="the job to go")
    deleted = [e for e in installation.audit(user.namespace, verbs=("delete",)) if e["objectRef"]["name"] == "cats"]
    assert [entry["responseStatus"]["code"] for entry in deleted] == [200]


def test_an_invalid_job_says_so_and_asks_for_no_pod(place: Place, installation: Installation) -> None:
    user, _ = place
    user.create(make_job(notifications=[{"on": ["Complete"], "webhookRef": {"name": "hook"}}]))
    installation.kube.wait_for(
        JOBS, "cats", lambda job: condition(job, "Validated").get("status") == "False", namespace=user.namespace
    )
    assert "spec.notifications" in user.job()["status"]["message"]
    assert "not supported yet: leave it out" in user.job()["status"]["message"]
    assert installation.kube.items("pods", namespace=user.namespace) == []
    user.change("cats", notifications=None)
    user.wait_phase("Scheduling")


def test_an_unknown_profile_heals_when_it_appears(place: Place, installation: Installation) -> None:
    user, kubelet = place
    name = f"late-{user.namespace}"
    user.create(make_job(resources={"profile": name}))
    installation.kube.wait_for(
        JOBS,
        "cats",
        lambda job: condition(job, "Validated").get("reason") == "ProfileNotFound",
        namespace=user.namespace,
    )
    installation.kube.apply(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.PROFILE_KIND,
            "metadata": {"name": name},
            "spec": {"device": "CPU"},
        }
    )
    assert "resources" in kubelet.wait_for_pod("cats-1-0")["spec"]["containers"][0]


def test_a_missing_secret_is_told_from_the_kubelets_events(place: Place, installation: Installation) -> None:
    user, kubelet = place
    user.create(make_job(credentials={"secretRef": {"name": "team-a-s3"}}))
    pod = kubelet.wait_for_pod("cats-1-0")
    installation.kube.api.create(
        "events",
        {
            "metadata": {"name": "mount"},
            "involvedObject": {
                "kind": "Pod",
                "name": "cats-1-0",
                "namespace": user.namespace,
                "uid": pod["metadata"]["uid"],
            },
            "reason": "FailedMount",
            "type": "Warning",
            "message": 'MountVolume.SetUp failed for volume "credentials" : secret "team-a-s3" not found',
            "lastTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),  # what is old is no news
        },
        namespace=user.namespace,
    )
    kubelet.bind("cats-1-0")
    status = user.wait_phase("Preparing")
    assert status["pending"]["cause"] == "MissingSecret"
    assert 'secret "team-a-s3" not found' in status["pending"]["detail"]
    kubelet.run("cats-1-0")
    installation.kube.wait_for(JOBS, "cats", lambda job: "pending" not in job["status"], namespace=user.namespace)
    assert user.job()["status"]["attempt"] == 1


def test_who_holds_the_gpus_is_told_with_the_operators_own_rights(place: Place, installation: Installation) -> None:
    user, kubelet = place
    api = installation.kube.api
    profile = make_profile()["spec"]
    room = {"cpu": "64", "memory": "512Gi", "ephemeral-storage": "2Ti", "pods": "110", profile["resourceName"]: "1"}
    labels = {profile["nodeAffinity"][0]["key"]: profile["nodeAffinity"][0]["values"][0]}
    api.create("nodes", {"metadata": {"name": "gpu-1", "labels": labels}})
    try:
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}
        api.patch("nodes", "gpu-1", {"status": {"allocatable": room, "conditions": [ready]}}, subresource="status")
        # Without the node controller nobody says that the node is well: the test does.
        api.patch("nodes", "gpu-1", {"spec": {"taints": []}})
        user.create(make_job(name="dogs"))
        kubelet.run("dogs-1-0", node="gpu-1")
        user.create(make_job())
        kubelet.wait_for_pod("cats-1-0")
        said = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
        condition_ = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
        kubelet.patch("cats-1-0", conditions=[condition_])
        pending = installation.kube.wait_for(
            JOBS,
            "cats",
            lambda job: job.get("status", {}).get("pending", {}).get("cause") == "InsufficientGPU",
            namespace=user.namespace,
        )["status"]["pending"]
        assert f"{user.namespace}/dogs 1" in pending["detail"]
    finally:
        api.delete("nodes", "gpu-1")


def test_quota_is_said_and_waited_for(place: Place, installation: Installation) -> None:
    user, kubelet = place
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}, "status": {"hard": {"pods": "0"}}}
    installation.kube.api.create("resourcequotas", quota, namespace=user.namespace)
    # Without the quota controller nobody counts: the test does.
    counted = {"status": {"hard": {"pods": "0"}, "used": {"pods": "0"}}}
    installation.kube.api.patch("resourcequotas", "none", counted, namespace=user.namespace, subresource="status")
    user.create(make_job())
    installation.kube.wait_for(
        JOBS,
        "cats",
        lambda job: job.get("status", {}).get("pending", {}).get("cause") == "QuotaExceeded",
        namespace=user.namespace,
    )
    installation.kube.api.delete("resourcequotas", "none", namespace=user.namespace)
    kubelet.wait_for_pod("cats-1-0")


def test_a_deleted_job_is_forgotten_and_its_name_can_be_used_again(place: Place, installation: Installation) -> None:
    user, kubelet = place
    user.create(make_job())
    kubelet.run("cats-1-0")
    user.wait_phase("Preparing")
    installation.kube.api.delete(JOBS, "cats", namespace=user.namespace)
    user.create(make_job())
    status = installation.kube.wait_for(
        JOBS,
        "cats",
        lambda job: job.get("status", {}).get("pending", {}).get("cause") == "PodNameTaken",
        namespace=user.namespace,
        describe="the old job's pod to be in the way",
    )["status"]
    assert "earlier job of the same name" in status["pending"]["hint"]
    kubelet.remove("cats-1-0")  # as the garbage collector does
    pod = kubelet.wait_for_pod("cats-1-0")
    assert pod["metadata"]["ownerReferences"][0]["uid"] == user.job()["metadata"]["uid"]


def test_somebody_elses_job_is_left_alone(place: Place, installation: Installation) -> None:
    user, kubelet = place
    user.create(make_job(name="theirs", managedBy="example.com/other"))
    user.create(make_job(name="ours"))
    kubelet.wait_for_pod("ours-1-0")
    assert "status" not in user.job("theirs")
    assert installation.kube.find("pods", "theirs-1-0", namespace=user.namespace) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"managedBy": "diffusion-operator.io/diffusion-operator"}, "managedBy cannot be changed"),
        ({"method": "FineTune", "lora": None}, "method cannot be changed: it decides the result"),
        ({"lora": {"rank": 7}}, "lora cannot be changed: it decides the result"),
        ({"runPolicy": {"backoffLimit": 7}}, ""),
    ],
)
def test_what_decides_the_result_and_who_is_in_charge_stays(place: Place, change: Object, message: str) -> None:
    user, _ = place
    user.create(make_job(name="theirs", managedBy="example.com/other", lora={"rank": 4, "alpha": 4}))
    if not message:  # negative control
        user.change("theirs", **change)
        return
    with pytest.raises(ApiError, match=message):
        user.change("theirs", **change)


def http_get(path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def test_metrics_and_health(place: Place, installation: Installation) -> None:
    user, kubelet = place
    assert (http_get("/healthz"), http_get("/readyz")) == ("ok", "ok")
    user.create(make_job())
    kubelet.run("cats-1-0")
    user.wait_phase("Preparing")
    series = f'diffusion_job_phase{{name="cats",namespace="{user.namespace}",phase="Preparing"}} 1.0'
    assert series in http_get("/metrics")
    installation.kube.api.delete(JOBS, "cats", namespace=user.namespace)
    wait_until(lambda: user.namespace not in http_get("/metrics"), describe="the job's series to vanish")
    text = http_get("/metrics")
    assert "diffusion_operator_reconcile_duration_seconds_bucket" in text
    assert 'diffusion_operator_attempts_ended_total{cause="Preempted"}' in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"http_port": str(PORT)}, "cannot be used: set another one"),
        ({"workers": "many"}, "DIFFUSION_OPERATOR_WORKERS: 'many' is not a number"),
    ],
)
def test_an_operator_that_cannot_work_says_why_and_ends(
    installation: Installation, settings: dict[str, str], words: str
) -> None:
    process = OperatorProcess(installation, **settings)
    assert process.wait() == 64
    assert words in process.tail().splitlines()[-1]


def test_an_operator_without_rights_says_which_and_ends(installation: Installation) -> None:
    process = OperatorProcess(replace(installation, kubeconfig=installation.stranger))
    assert process.wait() == 64
    assert "cannot list resource" in process.tail().splitlines()[-1]


def test_the_rights_of_the_manifest_are_enough_and_no_right_to_write_is_unused(installation: Installation) -> None:
    entries = [json.loads(line) for line in installation.audit_log.read_text().splitlines()]
    mine = [entry for entry in entries if entry["user"]["username"].endswith(":diffusion-operator")]
    # Quota answers 403 as well, but not because of missing rights.
    assert [entry for entry in mine if "RBAC" in entry.get("responseStatus", {}).get("message", "")] == []
    used = {
        (entry["objectRef"]["resource"], entry["objectRef"].get("subresource", ""), entry["verb"])
        for entry in mine
        if entry.get("objectRef") and entry["objectRef"]["resource"] != "selfsubjectaccessreviews"
    }
    assert writes(used) == writes(granted()) - FOR_QUEUES
    assert "secrets" not in {resource for resource, _, _ in granted()}


Rights = set[tuple[str, str, str]]
FOR_QUEUES: Rights = {("pods", "", "patch"), ("workloads", "", "delete")}
"""Used where a Kueue is: test_queues.py."""


def granted() -> Rights:
    """Return what the manifest grants: (resource, subresource, verb)."""
    documents = yaml.safe_load_all(MANIFEST.read_text())
    (role,) = [document for document in documents if document["kind"] == "ClusterRole"]
    pairs = [(name, verb) for grant in role["rules"] for name in grant["resources"] for verb in grant["verbs"]]
    return {(*name.partition("/")[::2], verb) for name, verb in pairs}


def writes(rights: Rights) -> Rights:
    return {right for right in rights if right[2] not in {"get", "list", "watch"}}
