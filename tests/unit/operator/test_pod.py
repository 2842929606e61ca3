"""The pod as a whole (golden files; UPDATE_GOLDEN=1 writes them) and the rules that a glance at it does not show."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_api import names
from diffusion_api.resources import NodeCapacity
from diffusion_api.run import RunConfig
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.desired import pod
from diffusion_operator.desired.quantity import times
from diffusion_operator.state import Job
from testkit.builders import Object, make_job, make_profile

GOLDEN = Path(__file__).parent / "golden"
ATTEMPT = pod.Attempt(number=3, micro_batch_size=None, trainer_image="registry.example/trainer:1")


def build(job: Object | None = None, profile: Object | None = None, *, attempt: pod.Attempt = ATTEMPT) -> Object:
    read = Job.read(job or make_job())
    assert read.spec is not None, read.problems
    offered = ProfileSpec.model_validate((profile or make_profile())["spec"])
    return pod.build(read, read.spec, offered, attempt=attempt, rank=0)


FULL: dict[str, Any] = {
    "credentials": {"secretRef": {"name": "team-a-s3"}, "serviceAccountName": "trainer"},
    "resources": {"capacity": "Spot"},
    "runPolicy": {"stallSeconds": 600},
    "podOverrides": {
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "team", "operator": "Exists"}],
        "labels": {"cost-centre": "7", names.LABEL_JOB_UID: "forged"},
        "annotations": {"note": "mine", names.ANNOTATION_RUN: "forged"},
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "POD_IP", "value": "forged"}],
        "priorityClassName": "batch",
        "schedulerName": "volcano",
        "imagePullSecrets": [{"name": "registry"}],
    },
}


@pytest.mark.parametrize(("name", "spec"), [("minimal", {}), ("full", FULL)])
def test_golden(name: str, spec: dict[str, Any]) -> None:
    profile = make_profile(runtimeClassName="nvidia", env=[{"name": "NCCL_DEBUG", "value": "WARN"}])
    attempt = replace(ATTEMPT, capacity="Spot" if spec else "OnDemand")
    manifest = build(make_job(**spec), profile if spec else None, attempt=attempt)
    text = yaml.safe_dump(manifest, sort_keys=False, width=120)
    path = GOLDEN / f"pod-{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_the_run_config_survives_the_annotation() -> None:
    bound = pod.Attempt(number=3, micro_batch_size=2, trainer_image="t")
    manifest = build(make_job(runPolicy={"stallSeconds": 600}), attempt=bound)
    run = RunConfig.model_validate_json(manifest["metadata"]["annotations"][names.ANNOTATION_RUN])
    assert (run.attempt, run.micro_batch_size, run.stall_seconds, run.device) == (3, 2, 600, "CUDA")
    assert (run.job.name, run.job.uid) == ("cats", make_job()["metadata"]["uid"])
    assert run.spec.model.source == "s3://models/sd-v1-5/"


def test_null_is_not_replaced_by_a_default_on_the_way() -> None:
    job = make_job()
    job["spec"]["training"] = {"objective": {"snrGamma": None}, "optimizer": {"maxGradNorm": None}}
    run = RunConfig.model_validate_json(build(job)["metadata"]["annotations"][names.ANNOTATION_RUN])
    assert (run.spec.training.objective.snr_gamma, run.spec.training.optimizer.max_grad_norm) == (None, None)


def test_users_cannot_override_what_the_operator_relies_on() -> None:
    manifest = build(make_job(**FULL))
    assert manifest["metadata"]["labels"][names.LABEL_JOB_UID] == make_job()["metadata"]["uid"]
    assert manifest["metadata"]["annotations"][names.ANNOTATION_RUN].startswith("{")
    env = {entry["name"]: entry for entry in manifest["spec"]["containers"][0]["env"]}
    assert "valueFrom" in env["POD_IP"]
    assert env["NCCL_DEBUG"]["value"] == "INFO"


def test_autoscalers_leave_it_alone_unless_the_user_says_otherwise() -> None:
    key = "karpenter.sh/do-not-disrupt"
    assert build()["metadata"]["annotations"][key] == "true"
    allowed = make_job(podOverrides={"annotations": {key: "false"}})
    assert build(allowed)["metadata"]["annotations"][key] == "false"


def test_names_are_a_function_of_job_attempt_and_rank() -> None:
    assert build()["metadata"]["name"] == names.pod_name("cats", 3, 0)


class TestCapacity:
    SPOT = ("cloud.google.com/gke-spot", "true")

    def place(self, capacity: NodeCapacity, **profile: Any) -> tuple[dict[str, str], list[list[Any]], list[str]]:
        spec = build(profile=make_profile(**profile), attempt=replace(ATTEMPT, capacity=capacity))["spec"]
        required = (
            spec.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
        )
        terms = [
            [(item["key"], item["operator"], *item["values"]) for item in term["matchExpressions"]]
            for term in (required or {"nodeSelectorTerms": []})["nodeSelectorTerms"]
        ]
        return spec.get("nodeSelector", {}), terms, [entry["key"] for entry in spec["tolerations"]]

    def test_spot_is_selected_and_tolerated(self) -> None:
        selector, terms, tolerated = self.place("Spot")
        assert selector == dict([self.SPOT])
        assert len(terms) == 1
        assert self.SPOT[0] in tolerated

    def test_on_demand_avoids_spot_nodes(self) -> None:
        selector, terms, tolerated = self.place("OnDemand")
        assert (selector, self.SPOT[0] in tolerated) == ({}, False)
        assert terms[0][-1] == (self.SPOT[0], "NotIn", self.SPOT[1])

    def test_a_spot_node_with_several_labels_is_avoided_by_the_lack_of_any(self) -> None:
        _, terms, _ = self.place("OnDemand", spot={"nodeSelector": {"a": "1"}})
        assert [term[-1][0] for term in terms] == ["cloud.google.com/gke-spot", "a"]
        assert all(term[0][0] == "nvidia.com/gpu.product" for term in terms)

    def test_dead_nodes_are_left_after_30_seconds(self) -> None:
        dead = [entry for entry in build()["spec"]["tolerations"] if entry["key"].startswith("node.kubernetes.io/")]
        assert [(entry["effect"], entry["tolerationSeconds"]) for entry in dead] == [("NoExecute", 30)] * 2


class TestCredentials:
    def test_the_pair_of_keys_is_required_and_the_rest_optional(self) -> None:
        spec = build(make_job(credentials={"secretRef": {"name": "s"}}))["spec"]
        volume = next(item for item in spec["volumes"] if item["name"] == "credentials")["projected"]
        optional = {
            source["secret"]["items"][0]["key"]: source["secret"].get("optional", False) for source in volume["sources"]
        }
        assert optional == {
            "AWS_ACCESS_KEY_ID": False,
            "AWS_SECRET_ACCESS_KEY": False,
            "AWS_SESSION_TOKEN": True,
            "AWS_REGION": True,
            "AWS_ENDPOINT_URL": True,
        }

    def test_without_a_secret_nothing_is_mounted(self) -> None:
        assert "credentials" not in [volume["name"] for volume in build()["spec"]["volumes"]]

    def test_the_pod_has_no_token_of_the_cluster_even_with_an_account(self) -> None:
        spec = build(make_job(credentials={"serviceAccountName": "trainer"}))["spec"]
        assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == ("trainer", False)


def test_a_profile_without_gpus_asks_for_none() -> None:
    container = build(profile=make_profile(device="CPU", resourceName=None))["spec"]["containers"][0]
    assert set(container["resources"]["limits"]) == {"memory", "ephemeral-storage"}


@pytest.mark.parametrize(
    ("quantity", "factor", "product"),
    [
        ("4", 2, "8"),
        ("1.5Gi", 2, "3Gi"),
        ("500m", 3, "1500m"),
        ("100Gi", 1, "100Gi"),
        ("10", 10, "100"),
        ("0.1", 3, "0.3"),
    ],
)
def test_quantities_are_multiplied_in_their_unit(quantity: str, factor: int, product: str) -> None:
    assert times(quantity, factor) == product
