"""Each preset of examples/profiles/ on nodes with the labels and taints of its cloud, placed by the real scheduler.

A pod must reach the node that it is meant for and none of the others, which differ in one thing each: the GPU, its
memory, spot, sharing. What no node can take must say why.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from diffusion_api.names import PROFILE_PLURAL
from diffusion_api.resources import NodeCapacity
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.desired import pod
from diffusion_operator.policies.waiting.diagnosis import explain
from diffusion_operator.policies.waiting.facts import WaitingFacts
from diffusion_operator.policies.waiting.nodes import matches, untolerated
from diffusion_operator.state import Job
from testkit.builders import make_job, make_profile
from testkit.cluster import NodeSpec
from testkit.kube import Kube, Object, condition
from testkit.kwok import FakeNodes, Scheduler
from testkit.operating import Installation, OperatorProcess, User, installed
from testkit.pods import pod as plain

PRESETS = Path(__file__).resolve().parents[2] / "examples" / "profiles"
CAPACITIES: tuple[NodeCapacity, ...] = ("OnDemand", "Spot")
NONE = ""

pytestmark = pytest.mark.apiserver


def labelled(prefix: str, **labels: str) -> dict[str, str]:
    """Return labels below a prefix; `_` stands for `-`."""
    return {f"{prefix}/{key.replace('_', '-')}": value for key, value in labels.items()}


def gke(name: str, accelerator: str, *, spot: bool = False, **more: str) -> NodeSpec:
    labels = labelled(
        "cloud.google.com", gke_accelerator=accelerator, gke_nodepool=name, gke_gpu_driver_version="default"
    )
    labels |= labelled("cloud.google.com", **more)
    taints = ["nvidia.com/gpu=present:NoSchedule"]
    if spot:
        labels |= labelled("cloud.google.com", gke_spot="true", gke_provisioning="spot")
        taints.append("cloud.google.com/gke-spot=true:NoSchedule")
    return NodeSpec(name, gpus=1, labels=labels, taints=taints)


def managed(name: str, machine: str, *, spot: bool = False) -> NodeSpec:
    labels = {
        "node.kubernetes.io/instance-type": machine,
        "eks.amazonaws.com/capacityType": "SPOT" if spot else "ON_DEMAND",
        "eks.amazonaws.com/nodegroup": name,
        "nvidia.com/gpu.present": "true",
    }
    taints = ["nvidia.com/gpu=true:NoSchedule", *(["spot=true:NoSchedule"] if spot else [])]
    return NodeSpec(name, gpus=1, labels=labels, taints=taints)


def karpenter(prefix: str, name: str, gpu: str, memory: int, *, capacity: str = "on-demand") -> NodeSpec:
    labels = labelled(
        prefix,
        instance_gpu_name=gpu,
        instance_gpu_memory=str(memory),
        instance_gpu_manufacturer="nvidia",
        instance_gpu_count="1",
    )
    labels |= {"karpenter.sh/capacity-type": capacity, "karpenter.sh/nodepool": "gpu"}
    return NodeSpec(name, gpus=1, labels=labels, taints=["nvidia.com/gpu=true:NoSchedule"])


def discovered(name: str, product: str, memory: int, *, family: str = "ampere", **more: str) -> NodeSpec:
    labels = {
        "nvidia.com/gpu.product": product,
        "nvidia.com/gpu.memory": str(memory),
        "nvidia.com/gpu.family": family,
        "nvidia.com/gpu.present": "true",
        "nvidia.com/gpu.sharing-strategy": more.pop("sharing", "none"),
        "nvidia.com/mig.strategy": more.pop("strategy", "none"),
    }
    resource = more.pop("resource", "nvidia.com/gpu")
    return NodeSpec(name, gpus=1, gpu_resource=resource, labels=labels, taints=["nvidia.com/gpu=present:NoSchedule"])


def with_karpenter(prefix: str) -> list[NodeSpec]:
    return [
        karpenter(prefix, "p4de", "a100", 81920),
        karpenter(prefix, "p4de-spot", "a100", 81920, capacity="spot"),
        karpenter(prefix, "p4d", "a100", 40960),
        karpenter(prefix, "g6-reserved", "l4", 22888, capacity="reserved"),
        karpenter(prefix, "g6-spot", "l4", 22888, capacity="spot"),
        karpenter(prefix, "g5", "a10g", 22888),
        karpenter(prefix, "g7e-spot", "rtx-pro-server-6000", 98304, capacity="spot"),
        karpenter(prefix, "p5", "h100", 81920),
    ]


WITH_KARPENTER = {
    "a100-80gb OnDemand": "p4de",
    "a100-80gb Spot": "p4de-spot",
    "a100-40gb OnDemand": "p4d",
    "a100-40gb Spot": NONE,
    "l4 OnDemand": "g6-reserved",
    "l4 Spot": "g6-spot",
    "rtx-pro-6000 OnDemand": NONE,
    "rtx-pro-6000 Spot": "g7e-spot",
}


@dataclass(frozen=True)
class Cloud:
    """A preset, nodes as the cloud makes them, and where each profile and capacity must come to lie."""

    preset: str
    nodes: list[NodeSpec]
    expected: dict[str, str]
    said: dict[str, str] = field(default_factory=dict)
    """Words of the diagnosis, by what finds no node."""
    also: dict[str, list[str]] = field(default_factory=dict)
    """Further nodes that fit and are taken."""


CLOUDS = [
    Cloud(
        "gke",
        [
            gke("a100-80", "nvidia-a100-80gb"),
            gke("a100-80-spot", "nvidia-a100-80gb", spot=True),
            gke("a100-40-slices", "nvidia-tesla-a100", gke_gpu_partition_size="3g.20gb"),
            gke("a100-40-spot", "nvidia-tesla-a100", spot=True),
            gke("l4", "nvidia-l4"),
            gke("l4-shared", "nvidia-l4", spot=True, gke_gpu_sharing_strategy="time-sharing"),
            gke("rtx", "nvidia-rtx-pro-6000"),
            gke("rtx-spot", "nvidia-rtx-pro-6000", spot=True),
            gke("h100", "nvidia-h100-80gb"),
        ],
        {
            "a100-80gb OnDemand": "a100-80",
            "a100-80gb Spot": "a100-80-spot",
            "a100-40gb OnDemand": NONE,
            "a100-40gb Spot": "a100-40-spot",
            "l4 OnDemand": "l4",
            "l4 Spot": NONE,
            "rtx-pro-6000 OnDemand": "rtx",
            "rtx-pro-6000 Spot": "rtx-spot",
        },
        {
            "a100-40gb OnDemand": "cloud.google.com/gke-gpu-partition-size DoesNotExist",
            "l4 Spot": "cloud.google.com/gke-gpu-sharing-strategy NotIn [mps, time-sharing]",
        },
    ),
    Cloud(
        "eks-managed-node-groups",
        [
            managed("p4de", "p4de.24xlarge"),
            managed("p4de-spot", "p4de.24xlarge", spot=True),
            managed("p4d", "p4d.24xlarge"),
            managed("g6", "g6.4xlarge"),
            managed("g6-spot", "g6.12xlarge", spot=True),
            managed("g5", "g5.4xlarge"),
            managed("g7e-spot", "g7e.8xlarge", spot=True),
        ],
        {
            "a100-80gb OnDemand": "p4de",
            "a100-80gb Spot": "p4de-spot",
            "a100-40gb OnDemand": "p4d",
            "a100-40gb Spot": NONE,
            "l4 OnDemand": "g6",
            "l4 Spot": "g6-spot",
            "rtx-pro-6000 OnDemand": NONE,
            "rtx-pro-6000 Spot": "g7e-spot",
        },
        {"rtx-pro-6000 OnDemand": "eks.amazonaws.com/capacityType NotIn [SPOT]"},
    ),
    Cloud(
        "karpenter",
        with_karpenter("karpenter.k8s.aws"),
        WITH_KARPENTER,
        {"rtx-pro-6000 OnDemand": "karpenter.sh/capacity-type NotIn [spot]"},
    ),
    Cloud(
        "eks-auto-mode",
        with_karpenter("eks.amazonaws.com"),
        WITH_KARPENTER,
        {"rtx-pro-6000 OnDemand": "karpenter.sh/capacity-type NotIn [spot]"},
    ),
    Cloud(
        "gpu-feature-discovery",
        [
            discovered("a100-pcie", "NVIDIA-A100-80GB-PCIe", 81920),
            discovered("a100-40", "NVIDIA-A100-SXM4-40GB", 40960),
            discovered("l40s-shared", "NVIDIA-L40S-SHARED", 46068, family="ada-lovelace", sharing="time-slicing"),
            discovered("rtx-4090", "NVIDIA-GeForce-RTX-4090", 24564, family="ada-lovelace"),
            discovered("rtx-3090", "NVIDIA-GeForce-RTX-3090", 24576),
            discovered("slices", "NVIDIA-A100-SXM4-80GB", 81920, strategy="mixed", resource="nvidia.com/mig-3g.40gb"),
            discovered("small", "NVIDIA-A100-SXM4-80GB", 81920, strategy="mixed", resource="nvidia.com/mig-1g.10gb"),
        ],
        {
            "a100-80gb OnDemand": "a100-pcie",
            "gpu-40gb OnDemand": "a100-40",
            "rtx-4090 OnDemand": "rtx-4090",
            "mig-40gb OnDemand": "slices",
        },
        also={"gpu-40gb OnDemand": ["a100-pcie"]},
    ),
]


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("presets")) as found, Scheduler(found.kube):
        yield found


@pytest.fixture(scope="module")
def nodes(installation: Installation) -> Iterator[FakeNodes]:
    with FakeNodes(installation.kube) as found:
        yield found


def applied(kube: Kube, preset: str) -> dict[str, ProfileSpec]:
    """Apply the preset as an admin does; return its profiles as the API server keeps them."""
    text = (PRESETS / f"{preset}.yaml").read_text()
    kube.kubectl("apply", "-f", PRESETS / f"{preset}.yaml")
    names = [item["metadata"]["name"] for item in yaml.safe_load_all(text)]
    return {name: ProfileSpec.model_validate(kube.get(PROFILE_PLURAL, name)["spec"]) for name in names}


def build(name: str, profile: ProfileSpec, *, capacity: NodeCapacity, namespace: str) -> Object:
    """Return the pod that the operator would make for a job of that profile."""
    job = Job.read(make_job(name=f"{name}-{capacity.lower()}", namespace=namespace, resources={"profile": name}))
    assert job.spec is not None
    attempt = pod.Attempt(number=1, micro_batch_size=None, trainer_image="none", capacity=capacity)
    return pod.build(job, job.spec, profile, attempt=attempt, rank=0)


def wait_known(kube: Kube, specs: list[NodeSpec], namespace: str) -> None:
    """Wait until the scheduler knows all nodes, without the taint that each has at first: it hears of them late."""
    for spec in specs:
        tolerations = [{"key": taint.key, "operator": "Exists"} for taint in spec.parsed_taints]
        probe = plain(f"probe-{spec.name}", image="none")
        probe["spec"] |= {"nodeSelector": {"kubernetes.io/hostname": spec.name}, "tolerations": tolerations}
        kube.api.create("pods", probe, namespace=namespace)
    for spec in specs:
        kube.wait_phase(f"probe-{spec.name}", "Running", namespace=namespace)


def judged(kube: Kube, name: str, namespace: str) -> Object:
    """Return the pod once the scheduler has said yes or no."""
    return kube.wait_for("pods", name, lambda found: condition(found, "PodScheduled"), namespace=namespace)


def fits(entry: Object, node: Object) -> bool:
    """Return whether the node could take the pod if it were empty."""
    wanted = entry["spec"]["containers"][0]["resources"]["limits"]
    gpus = {name for name in wanted if "/" in name}
    return matches(entry, node) and not untolerated(entry, node) and gpus <= set(node["status"]["allocatable"])


def why(found: Object, kube: Kube, profile: ProfileSpec, *, name: str) -> tuple[str, str]:
    """Return cause and detail of what keeps the pod from a node, as the operator would say it."""
    facts = WaitingFacts(
        namespace=found["metadata"]["namespace"],
        pods=(found,),
        profile=name,
        resource=profile.resource_name,
        nodes=tuple(kube.items("nodes")),
        others=tuple(entry for entry in kube.items("pods") if entry["spec"].get("nodeName")),
    )
    answer = explain(facts, now=datetime.now(UTC))
    return str(answer.cause), answer.detail


@pytest.mark.parametrize("cloud", CLOUDS, ids=lambda cloud: cloud.preset)
def test_pods_reach_the_nodes_they_are_meant_for(installation: Installation, nodes: FakeNodes, cloud: Cloud) -> None:
    kube = installation.kube
    profiles = applied(kube, cloud.preset)
    # Names of their own: pods of the cloud before end when they will, and hold what they have until then.
    specs = [replace(spec, name=f"{cloud.preset}-{spec.name}") for spec in (*cloud.nodes, NodeSpec("cpu"))]
    nodes.add(specs)
    try:
        with kube.namespace(cloud.preset) as namespace:
            wait_known(kube, specs, namespace)
            found: dict[str, Object] = {}
            for name, profile in profiles.items():
                for capacity in CAPACITIES[: 1 if profile.spot is None else 2]:
                    manifest = build(name, profile, capacity=capacity, namespace=namespace)
                    kube.api.create("pods", manifest, namespace=namespace)
                    found[f"{name} {capacity}"] = judged(kube, manifest["metadata"]["name"], namespace)
            places = {
                choice: entry["spec"].get("nodeName", NONE).removeprefix(f"{cloud.preset}-")
                for choice, entry in found.items()
            }
            assert places == cloud.expected | {"cpu OnDemand": "cpu"}
            known = kube.items("nodes")
            for choice, entry in found.items():
                fit = {node["metadata"]["name"] for node in known if fits(entry, node)}
                also = {f"{cloud.preset}-{name}" for name in cloud.also.get(choice, ())}
                assert fit == ({entry["spec"].get("nodeName")} | also) - {None}, choice  # not by chance
            for choice, words in cloud.said.items():
                name = choice.split()[0]
                cause, detail = why(found[choice], kube, profiles[name], name=name)
                assert (cause, words in detail) == ("TaintOrSelectorMismatch", True), detail
            # Whoever comes second finds the one GPU taken, and hears by whom.
            second = build("a100-80gb", profiles["a100-80gb"], capacity="OnDemand", namespace=namespace)
            second["metadata"]["name"] = "second"
            kube.api.create("pods", second, namespace=namespace)
            cause, detail = why(judged(kube, "second", namespace), kube, profiles["a100-80gb"], name="a100-80gb")
            assert (cause, "a100-80gb-ondemand" in detail) == ("InsufficientGPU", True), detail
    finally:
        for spec in specs:
            kube.api.delete("nodes", spec.name)


def test_a_job_moves_on_until_it_finds_a_node(installation: Installation, nodes: FakeNodes) -> None:
    """No A100 is there, 40 GB are too many for what is: the third choice is the one."""
    kube = installation.kube
    applied(kube, "gpu-feature-discovery")
    present = discovered("moves-on-rtx", "NVIDIA-GeForce-RTX-4090", 24564, family="ada-lovelace")
    nodes.add([present])
    others = [{"profile": "gpu-40gb"}, {"profile": "rtx-4090", "capacity": "Any"}]
    resources = {"profile": "a100-80gb", "alternatives": others, "failoverSeconds": 0}
    try:
        with kube.namespace("moves-on") as namespace, OperatorProcess(installation):
            user = User(kube, namespace)
            user.create(make_job(resources=resources))
            status = user.wait_phase("Preparing", attempt=3)
            assert kube.get("pods", "cats-3-0", namespace=namespace)["spec"]["nodeName"] == present.name
            placement = status["placement"]
            assert (placement["profile"], placement["capacity"], placement["reason"]) == (
                "rtx-4090",
                "OnDemand",
                "NoCapacity",
            )
            assert "TaintOrSelectorMismatch: no node has what profile gpu-40gb asks for" in placement["message"]
            assert [item["profile"] for item in status["unavailable"]] == ["a100-80gb", "gpu-40gb"]
            assert [item.get("cause") for item in status["attempts"]] == [None, "NoCapacity"]
            assert "failures" not in status["counters"] or status["counters"]["failures"] == 0
    finally:
        kube.api.delete("nodes", present.name)


@pytest.mark.parametrize(
    ("requirement", "works"),
    [
        ({"key": "a", "values": ["x"]}, True),
        ({"key": "a", "operator": "Gt", "values": ["40000"]}, True),
        ({"key": "a", "operator": "Exists"}, True),
        ({"key": "a"}, False),
        ({"key": "a", "operator": "Gt", "values": ["40Gi"]}, False),
        ({"key": "a", "operator": "Lt", "values": ["1", "2"]}, False),
        ({"key": "a", "operator": "DoesNotExist", "values": ["x"]}, False),
    ],
)
def test_requirements_that_no_scheduler_could_read_are_refused(
    installation: Installation, requirement: Object, works: bool
) -> None:
    profile = make_profile(name="tried", nodeAffinity=[requirement])
    manifest = {**profile, "metadata": {"name": "tried"}}
    if works:
        installation.kube.apply(manifest)
    else:
        with pytest.raises(Exception, match="requirement on a: In and NotIn need values"):
            installation.kube.apply(manifest)
