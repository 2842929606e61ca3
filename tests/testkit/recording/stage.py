"""Where a situation is made: nodes, pods of others, the job's pods, and waiting until everybody has spoken."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from diffusion_api import names
from diffusion_api.resources import NodeCapacity
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator import timestamps
from diffusion_operator.desired import pod, pod_group
from diffusion_operator.state import Job
from testkit.builders import make_job, merge
from testkit.cluster import NodeSpec
from testkit.kube import ApiError, Kube, Object, condition
from testkit.kwok import MARK
from testkit.kwok import node as kwok_node
from testkit.pods import pod as plain
from testkit.recording.plant import NAMESPACE, OTHERS
from testkit.waiting import wait_until

PRESETS = Path(__file__).resolve().parents[3] / "examples" / "profiles"
IMAGE = "ghcr.io/acme/diffusion-trainer:0.1.0"
JOB = "cats"
BATCH = 48
"""A multiple of every number of GPUs that is asked for."""
PROBE = "probe"
HUGE = {"cpu": "100k"}
"""What no node has: a pod that asks for it hears how many nodes the scheduler knows."""


@cache
def preset(cloud: str, profile: str) -> Mapping[str, Any]:
    """Return the spec of a profile of examples/profiles/."""
    found = yaml.safe_load_all((PRESETS / f"{cloud}.yaml").read_text())
    return next(item["spec"] for item in found if item["metadata"]["name"] == profile)


class Stage:
    """One situation in the making."""

    def __init__(self, kube: Kube, *, name: str) -> None:
        self.kube = kube
        self.name = name
        self.profile_name = ""
        self.profile: ProfileSpec | None = None
        self.capacity: NodeCapacity = "OnDemand"
        self.pods: list[str] = []
        self.wanted = 1
        self.refusal = ""
        self.workload = ""
        self._made: list[tuple[str, str, str | None]] = []

    def make(self, kind: str, manifest: Object, *, namespace: str | None = None) -> Object:
        """Create an object that goes with the situation."""
        created = self.kube.api.create(kind, manifest, namespace=namespace)
        self._made.append((kind, manifest["metadata"]["name"], namespace))
        return created

    def node(self, spec: NodeSpec, *, silent: bool = False, **allocatable: str) -> None:
        """Add a node and wait until it is ready; a `silent` one has no kubelet, so that nothing happens to it."""
        manifest = kwok_node(spec)
        for kind in ("capacity", "allocatable"):
            manifest["status"][kind] = {**manifest["status"][kind], **allocatable}
        if silent:
            del manifest["metadata"]["labels"][MARK]
        self.make("nodes", manifest)

    def settle(self, *, unready: Sequence[str] = ()) -> None:
        """Wait until all nodes are ready but those, their taints are the ones they asked for, and all know of it."""

        def well() -> bool:
            nodes = [node for node in self.kube.items("nodes") if node["metadata"]["name"] not in unready]
            waits = {"node.kubernetes.io/not-ready"}
            return all(
                condition(node, "Ready").get("status") == "True"
                and not waits & {taint["key"] for taint in node["spec"].get("taints") or ()}
                for node in nodes
            )

        wait_until(well, describe="the nodes", timeout=60)
        self._known()

    def say(self, node: str, kind: str, status: str, *, reason: str, message: str) -> None:
        """Write a condition of a silent node, as its kubelet would."""
        now = timestamps.to_text(datetime.now(UTC))
        entry = {"type": kind, "status": status, "reason": reason, "message": message}
        entry |= {"lastHeartbeatTime": now, "lastTransitionTime": now}
        present = self.kube.get("nodes", node)["status"].get("conditions") or []
        others = [found for found in present if found["type"] != kind]
        self.kube.api.patch("nodes", node, {"status": {"conditions": [*others, entry]}}, subresource="status")

    def holder(
        self, name: str, node: str, *, gpus: int = 0, job: str = "", namespace: str = OTHERS, **more: Any
    ) -> None:
        """Put somebody's pod on a node: `requests` besides the GPUs, further fields of the pod's spec in `more`."""
        requests, resource = more.pop("requests", {}), more.pop("resource", "nvidia.com/gpu")
        manifest = plain(name, image=IMAGE, labels={names.LABEL_JOB_NAME: job} if job else {}, **more)
        manifest["spec"]["nodeName"] = node
        gpu = {resource: str(gpus)} if gpus else {}
        manifest["spec"]["containers"][0]["resources"] = {"requests": {**requests, **gpu}, "limits": gpu}
        self.kube.api.create("pods", manifest, namespace=namespace)

    def submit(
        self,
        cloud: str,
        profile: str,
        *,
        capacity: NodeCapacity = "OnDemand",
        nodes: int = 1,
        gpus: int = 1,
        **more: Any,
    ) -> None:
        """Create the pods of a job, as the operator does.

        `more`: `queue`; `avoided` nodes; `changed`, merged into the profile; `only` so many pods; `alter`, what an
        admission webhook of the cluster would change of a pod; anything else is the job's spec.
        """
        self.profile_name, self.capacity, self.wanted = profile, capacity, nodes
        spec = ProfileSpec.model_validate(merge(preset(cloud, profile), more.pop("changed", {})))
        self.profile = spec
        queue, avoided, only = more.pop("queue", ""), more.pop("avoided", ()), more.pop("only", nodes)
        alter: Callable[[Object], Object] = more.pop("alter", lambda manifest: manifest)
        job = Job.read(
            make_job(
                name=JOB,
                namespace=NAMESPACE,
                uid=str(uuid.uuid5(uuid.NAMESPACE_OID, self.name)),
                metadata={"labels": {names.LABEL_QUEUE: queue}} if queue else {},
                resources={"profile": profile, "gpusPerNode": gpus, "nodes": nodes},
                training={"batchSize": BATCH},
                **more,
            )
        )
        if job.spec is None:
            raise ValueError(f"situation {self.name}: {'; '.join(job.problems)}")
        attempt = pod.Attempt(
            number=1, micro_batch_size=None, trainer_image=IMAGE, avoided_nodes=avoided, capacity=capacity
        )
        manifests = tuple(pod.build(job, job.spec, spec, attempt=attempt, rank=rank) for rank in range(nodes))
        if queue:
            self.workload = names.workload_name(job.name, job.uid, 1)
            manifests = pod_group.join(manifests, pod_group.asked(job, job.spec), workload=self.workload)
        for manifest in manifests[:only]:
            self._create(alter(manifest))

    def _create(self, manifest: Object) -> None:
        try:
            self.kube.api.create("pods", manifest, namespace=NAMESPACE)
        except ApiError as error:
            self.refusal = str(error).partition(": ")[2]
            return
        self.pods.append(manifest["metadata"]["name"])

    def found(self) -> list[Object]:
        """Return the job's pods as they are."""
        return [self.kube.get("pods", name, namespace=NAMESPACE) for name in self.pods]

    def judged(self, *, saying: str = "") -> None:
        """Wait until the scheduler has judged each pod, one of them with these words, and has said so in events."""

        def spoken() -> bool:
            said = [condition(entry, "PodScheduled") for entry in self.found()]
            waits = [entry for entry in said if entry.get("status") == "False"]
            heard = any(saying in entry.get("message", "") for entry in waits)
            return all(said) and heard and len(self._events("FailedScheduling")) >= len(waits)

        wait_until(spoken, describe=f"the scheduler to judge {self.pods}", timeout=30, detail=self._told)

    def said(self, reason: str) -> bool:
        """Return whether there is such an event about a pod of the job."""
        return bool(self._events(reason))

    def _events(self, reason: str) -> set[str]:
        found = self.kube.items("events", namespace=NAMESPACE)
        return {entry["involvedObject"]["name"] for entry in found if entry["reason"] == reason} & set(self.pods)

    def _told(self) -> str:
        return "\n".join(f"{entry['metadata']['name']}: {entry['status'].get('conditions')}" for entry in self.found())

    def placed(self, *pods: str) -> None:
        """Wait until these pods have a node."""
        for name in pods:
            self.kube.wait_for("pods", name, lambda found: found["spec"].get("nodeName"), namespace=NAMESPACE)

    def aged(self, seconds: float) -> None:
        """Wait until the pods are so old, for what is only known by silence."""
        made = max(timestamps.from_text(entry["metadata"]["creationTimestamp"]) for entry in self.found())
        wait_until(
            lambda: datetime.now(UTC) >= made + timedelta(seconds=seconds), describe="time", timeout=seconds + 30
        )

    def queued(self, until: Callable[[Object], Any], *, name: str = "") -> None:
        """Wait for something about the job's Workload (or the one named)."""
        self.kube.wait_for("workloads", name or self.workload, until, namespace=NAMESPACE)

    def _known(self) -> None:
        """Wait until the scheduler has seen every node: it counts them when it finds none for a pod, twice over.

        The second probe also comes after whatever was created before the first was judged.
        """
        total = len(self.kube.items("nodes"))
        for _ in range(2):
            wait_until(lambda: self._probe(total), describe=f"the scheduler to know {total} nodes", timeout=60)

    def _probe(self, total: int) -> bool:
        manifest = plain(PROBE, image=IMAGE)
        manifest["spec"]["containers"][0]["resources"] = {"requests": HUGE}
        self.kube.api.create("pods", manifest, namespace=OTHERS)
        try:
            judged = self.kube.wait_for(
                "pods", PROBE, lambda found: condition(found, "PodScheduled").get("message"), namespace=OTHERS
            )
        finally:
            self.kube.api.delete("pods", PROBE, namespace=OTHERS, grace_seconds=0)
            self.kube.wait_gone("pods", PROBE, namespace=OTHERS)
        return total == 0 or f"0/{total} nodes" in condition(judged, "PodScheduled")["message"]

    def clear(self) -> None:
        """Remove everything that the situation is made of."""
        for namespace in (NAMESPACE, OTHERS):
            for kind in ("pods", "workloads"):
                self._remove_all(kind, namespace)
        for kind, name, within in reversed(self._made):
            self.kube.api.delete(kind, name, namespace=within, grace_seconds=0)
            self._release(kind, name, within)
            self.kube.wait_gone(kind, name, namespace=within)
        path = self.kube.api.resource("events").path(namespace=NAMESPACE)
        self.kube.api.request("DELETE", path, body={})
        # Policies and webhooks work on for a moment after they are gone.
        wait_until(self._admits, describe="pods to be admitted again")

    def _admits(self) -> bool:
        manifest = plain(PROBE, image=IMAGE)
        path = self.kube.api.resource("pods").path(namespace=NAMESPACE)
        try:
            self.kube.api.request("POST", f"{path}?dryRun=All", body=manifest)
        except ApiError:
            return False
        return True

    def _remove_all(self, kind: str, namespace: str) -> None:
        try:
            self.kube.api.resource(kind)
        except LookupError:
            return  # there is no Kueue
        for entry in self.kube.items(kind, namespace=namespace):
            name = entry["metadata"]["name"]
            self.kube.api.delete(kind, name, namespace=namespace, grace_seconds=0)
            self._release(kind, name, namespace)
            self.kube.wait_gone(kind, name, namespace=namespace)

    def _release(self, kind: str, name: str, namespace: str | None) -> None:
        """Take finalizers off what their owners may not be here to let go; harmless where it is gone."""
        found = self.kube.find(kind, name, namespace=namespace)
        if found is not None and found["metadata"].get("finalizers"):
            try:
                self.kube.api.patch(kind, name, {"metadata": {"finalizers": None}}, namespace=namespace)
            except ApiError as error:
                if error.status != 404:
                    raise
