"""What stands in the pod's own way: claims, gates, schedulers. Some is what an admission webhook adds to a pod."""

from __future__ import annotations

from collections.abc import Callable

from testkit.builders import merge
from testkit.cluster import NodeSpec
from testkit.kube import Object
from testkit.recording.clouds import CPU, GFD, GKE, PROFILE
from testkit.recording.plant import NAMESPACE
from testkit.recording.situation import Situations
from testkit.recording.stage import Stage

SITUATIONS = Situations()
ZONE = "topology.kubernetes.io/zone"
SILENCE = 61
"""Seconds after which a scheduler that says nothing is a finding."""


def _with_claim(name: str) -> Callable[[Object], Object]:
    """Return what a webhook does that mounts a claim in every pod."""

    def alter(manifest: Object) -> Object:
        volume = {"name": "data", "persistentVolumeClaim": {"claimName": name}}
        return merge(manifest, {"spec": {"volumes": [*manifest["spec"]["volumes"], volume]}})

    return alter


def _gated(*gates: str) -> Callable[[Object], Object]:
    return lambda manifest: merge(manifest, {"spec": {"schedulingGates": [{"name": gate} for gate in gates]}})


def _claim(stage: Stage, *, storage_class: str, volume: str = "") -> None:
    spec: Object = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "100Gi"}},
        "storageClassName": storage_class,
    }
    spec |= {"volumeName": volume} if volume else {}
    stage.make("persistentvolumeclaims", {"metadata": {"name": "data"}, "spec": spec}, namespace=NAMESPACE)


def _class(stage: Stage, name: str, *, provisioner: str, mode: str) -> None:
    stage.make("storageclasses", {"metadata": {"name": name}, "provisioner": provisioner, "volumeBindingMode": mode})


def _volume(stage: Stage, *, zone: str) -> None:
    """Make a volume of a zone, and the claim that the controller binds to it."""
    term = {"matchExpressions": [{"key": ZONE, "operator": "In", "values": [zone]}]}
    spec: Object = {
        "capacity": {"storage": "100Gi"},
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "disks",
        "csi": {"driver": "pd.csi.storage.gke.io", "volumeHandle": "disk-1"},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}},
    }
    stage.make("persistentvolumes", {"metadata": {"name": "disk-1"}, "spec": spec})
    _claim(stage, storage_class="disks", volume="disk-1")
    stage.kube.wait_for(
        "persistentvolumeclaims", "data", lambda found: found["status"].get("phase") == "Bound", namespace=NAMESPACE
    )


def _zoned(stage: Stage, name: str, zone: str) -> None:
    spec = GKE.node(name)
    stage.node(NodeSpec(name, gpus=8, labels={**spec.labels, ZONE: zone}, taints=spec.taints))


@SITUATIONS("MissingPersistentVolumeClaim", "data", hint=("PersistentVolumeClaim data",))
def claim_missing(stage: Stage) -> None:
    """The claim does not exist."""
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, alter=_with_claim("data"))
    stage.judged()


@SITUATIONS("VolumeBinding", "unbound immediate PersistentVolumeClaims")
def claim_unbound(stage: Stage) -> None:
    """The claim waits for a volume that nobody makes."""
    _class(stage, "slow", provisioner="example.com/nobody", mode="Immediate")
    _claim(stage, storage_class="slow")
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, alter=_with_claim("data"))
    stage.judged()


@SITUATIONS("VolumeBinding", "persistent volumes to bind")
def claim_without_local_volume(stage: Stage) -> None:
    """The claim is for local volumes, bound with the first pod, and there are none."""
    _class(stage, "local", provisioner="kubernetes.io/no-provisioner", mode="WaitForFirstConsumer")
    _claim(stage, storage_class="local")
    stage.node(GFD.node("a100-1"))
    stage.node(CPU)
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, alter=_with_claim("data"))
    stage.judged()


@SITUATIONS("VolumeBinding")
def claim_whose_driver_is_silent(stage: Stage) -> None:
    """A node is chosen, and the scheduler waits without a word for the driver to make the volume there."""
    _class(stage, "gp3", provisioner="ebs.csi.aws.com", mode="WaitForFirstConsumer")
    _claim(stage, storage_class="gp3")
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, alter=_with_claim("data"))
    stage.aged(SILENCE)


@SITUATIONS("VolumeBinding", hint=("zone",))
def volume_in_another_zone(stage: Stage) -> None:
    """The volume is in a zone without such nodes."""
    _volume(stage, zone="us-east1-a")
    _zoned(stage, "a100-1", "us-east1-b")
    stage.node(NodeSpec("cpu-1", labels={ZONE: "us-east1-a"}))
    stage.settle()
    stage.submit("gke", PROFILE, alter=_with_claim("data"))
    stage.judged()


@SITUATIONS("InsufficientGPU", "1 Insufficient nvidia.com/gpu")
def volume_in_the_zone_of_the_full_node(stage: Stage) -> None:
    """The volume is in the zone of the node that is full; the free one is in another zone."""
    _volume(stage, zone="us-east1-a")
    _zoned(stage, "a100-1", "us-east1-a")
    _zoned(stage, "a100-2", "us-east1-b")
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.settle()
    stage.submit("gke", PROFILE, alter=_with_claim("data"))
    stage.judged()


@SITUATIONS("Gated", "example.com/approval", hint=("example.com/approval",))
def gated(stage: Stage) -> None:
    """A webhook of the cluster holds pods back until somebody approves."""
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, alter=_gated("example.com/approval"))
    _await_gated(stage)


@SITUATIONS("Gated", "example.com/approval", "example.com/budget")
def gated_twice(stage: Stage) -> None:
    """Two gates, on a cluster whose GPUs are all taken too."""
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.holder("dogs-1-0", "a100-1", gpus=8, job="dogs")
    stage.submit("gpu-feature-discovery", PROFILE, alter=_gated("example.com/approval", "example.com/budget"))
    _await_gated(stage)


@SITUATIONS("Unknown", "volcano", hint=("schedulerName",))
def scheduler_missing(stage: Stage) -> None:
    """The user names a scheduler that does not run."""
    stage.node(GFD.node("a100-1"))
    stage.settle()
    stage.submit("gpu-feature-discovery", PROFILE, podOverrides={"schedulerName": "volcano"})
    stage.aged(SILENCE)


def _await_gated(stage: Stage) -> None:
    for name in stage.pods:
        stage.kube.wait_for(
            "pods",
            name,
            lambda found: (found["status"].get("conditions") or [{}])[0].get("reason") == "SchedulingGated",
            namespace=NAMESPACE,
        )
