"""kwok: nodes that exist only as objects, with a player of kubelets for all of them, for thousands of nodes and pods.

Everything but the containers is real: the API server, admission, the scheduler. A pod that is bound to such a node
becomes Running at once, ends as its annotations say, and is terminated when it is deleted.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from testkit import tools
from testkit.cluster.spec import NodeSpec
from testkit.kube import Kube, Object, condition
from testkit.process import ServerProcess, flags
from testkit.waiting import wait_until

# How long a pod runs (Go's notation: 500ms, 20s), without it until it is deleted; and its exit code, 0 unless set.
ENDS_AFTER = "testkit.kwok/ends-after"
EXIT_CODE = "testkit.kwok/exit-code"
MARK = "testkit.kwok/node"
_TERMINATED_EXIT_CODE = 143  # 128 + SIGTERM
# A configuration file replaces kwok's defaults, and none of these may be nought.
_OPTIONS = {"podPlayStageParallelism": 4, "nodePlayStageParallelism": 4, "nodeLeaseParallelism": 4}
# Of kwok's own stages these are taken as they are.
_STAGES = ("node/fast/node-initialize.yaml", "pod/fast/pod-ready.yaml")
_TEMPLATE = """\
{{ $now := Now }}
{{ $root := . }}
{{ $code := EXIT_CODE }}
containerStatuses:
{{ range $index, $item := .spec.containers }}
- image: {{ $item.image | Quote }}
  name: {{ $item.name | Quote }}
  ready: false
  restartCount: 0
  started: false
  state:
    terminated:
      exitCode: {{ $code }}
      finishedAt: {{ $now | Quote }}
      reason: {{ if eq $code "0" }}Completed{{ else }}Error{{ end }}
      startedAt: {{ $root.status.startTime | Quote }}
{{ end }}
conditions:
- lastTransitionTime: {{ $now | Quote }}
  status: "False"
  type: Ready
- lastTransitionTime: {{ $now | Quote }}
  status: "False"
  type: ContainersReady
phase: {{ if eq $code "0" }}Succeeded{{ else }}Failed{{ end }}
"""


class FakeNodes:
    """The nodes of one API server whose kubelets are played, for as long as the `with` block.

    `lease_seconds` is how long a node counts as alive without a sign of life; 0 spares the signs, for a control plane
    that nobody watches nodes in. `pod_addresses` is the range that pods get their addresses from.
    """

    def __init__(self, kube: Kube, *, lease_seconds: int = 0, pod_addresses: str = "10.0.0.1/24") -> None:
        self._kube = kube
        self._pod_addresses = pod_addresses
        self._lease_seconds = lease_seconds
        self._folder: Path | None = None
        self._process: ServerProcess | None = None

    def start(self) -> Self:
        """Start kwok. Nodes are made by `add`."""
        program = tools.binary("kwok")
        self._folder = folder = Path(tempfile.mkdtemp(prefix="testkit-kwok-"))
        config = folder / "kwok.yaml"
        config.write_text(yaml.safe_dump_all(_configuration(tools.source("kwok"))))
        options = {
            "config": config,
            "kubeconfig": self._kube.kubeconfig,
            "manage-nodes-with-label-selector": f"{MARK}=true",
            "node-lease-duration-seconds": self._lease_seconds,
            "node-ip": "10.0.0.1",
            "cidr": self._pod_addresses,
        }
        # Its home must not matter: there it looks for a configuration of the user's.
        self._process = ServerProcess([program, *flags(options)], log=folder / "kwok.log", env={"HOME": str(folder)})
        return self

    def stop(self) -> None:
        """End it. Nodes and pods stay as they are. Harmless when it is not running."""
        if self._process is not None:
            self._process.stop(grace_seconds=0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._folder = None

    def add(self, specs: Sequence[NodeSpec], *, timeout: float = 60) -> None:
        """Make nodes and wait until all are ready, with just the taints that they ask for."""
        for spec in specs:
            self._kube.api.create("nodes", node(spec))
        names = {spec.name for spec in specs}
        wait_until(lambda: names <= self._ready(), describe=f"{len(names)} nodes of kwok", timeout=timeout)
        for spec in specs:
            # The API server taints each new node; where no controller takes that off again, it is done here.
            self._kube.api.patch("nodes", spec.name, {"spec": {"taints": _taints(spec) or None}})

    def _ready(self) -> set[str]:
        if self._process is None:
            raise RuntimeError("kwok is not running: use FakeNodes in a `with` block or call start()")
        self._process.check()
        found = self._kube.items("nodes", labels=f"{MARK}=true")
        return {entry["metadata"]["name"] for entry in found if condition(entry, "Ready").get("status") == "True"}

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Scheduler:
    """The real kube-scheduler beside an API server that has none, for as long as the `with` block."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._folder: Path | None = None
        self._process: ServerProcess | None = None

    def __enter__(self) -> Self:
        program = tools.binary("kube-scheduler")
        self._folder = Path(tempfile.mkdtemp(prefix="testkit-scheduler-"))
        options = {
            "kubeconfig": self._kube.kubeconfig,
            "authentication-kubeconfig": self._kube.kubeconfig,
            "authorization-kubeconfig": self._kube.kubeconfig,
            "leader-elect": False,
            # Nobody asks it anything, and several may run side by side.
            "secure-port": 0,
        }
        self._process = ServerProcess([program, *flags(options)], log=self._folder / "kube-scheduler.log")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.stop(grace_seconds=0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._folder = None


def node(spec: NodeSpec) -> Object:
    """Return the object of a node that kwok looks after, with its GPUs, labels and taints."""
    offers = {
        "cpu": str(spec.cpu or 64),
        "memory": f"{spec.memory_gib or 512}Gi",
        "pods": "110",
        "ephemeral-storage": "1Ti",
    }
    if spec.gpus:
        offers[spec.gpu_resource] = str(spec.gpus)
    labels = {"kubernetes.io/hostname": spec.name, "kubernetes.io/os": "linux", MARK: "true", **spec.labels}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": spec.name, "labels": labels},
        "spec": {"taints": _taints(spec)},
        "status": {"capacity": offers, "allocatable": offers},
    }


def ends(pod: Object, *, after: str, exit_code: int = 0) -> Object:
    """Return the pod such that it ends by itself on a node of kwok's: `after` in Go's notation (500ms, 20s)."""
    metadata = dict(pod["metadata"])
    marks = {ENDS_AFTER: after, EXIT_CODE: str(exit_code)}
    metadata["annotations"] = {**metadata.get("annotations", {}), **marks}
    return {**pod, "metadata": metadata}


def _taints(spec: NodeSpec) -> list[Mapping[str, str]]:
    return [{"key": taint.key, "value": taint.value, "effect": taint.effect} for taint in spec.parsed_taints]


def _configuration(source: Path) -> list[Any]:
    """Return kwok's configuration: its own stages of becoming ready, and ours of ending."""
    upstream = [yaml.safe_load((source / "kustomize" / "stage" / name).read_text()) for name in _STAGES]
    annotation = f'.metadata.annotations["{ENDS_AFTER}"]'
    given = f'or (index .metadata.annotations "{EXIT_CODE}") "0"'
    alive = {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"}
    deleted = {"key": ".metadata.deletionTimestamp", "operator": "Exists"}
    running = {"key": ".status.phase", "operator": "In", "values": ["Running"]}
    ended = {"key": ".status.phase", "operator": "NotIn", "values": ["Running"]}
    return [
        {"apiVersion": "config.kwok.x-k8s.io/v1alpha1", "kind": "KwokConfiguration", "options": dict(_OPTIONS)},
        *upstream,
        _stage(
            "pod-ends",
            when=[alive, running, {"key": annotation, "operator": "Exists"}],
            then={"statusTemplate": _TEMPLATE.replace("EXIT_CODE", given)},
            delay={"durationFrom": {"expressionFrom": annotation}},
        ),
        # As a kubelet does: the object shows how the pod ended before it goes.
        _stage(
            "pod-terminates",
            when=[deleted, running],
            then={"statusTemplate": _TEMPLATE.replace("EXIT_CODE", json.dumps(str(_TERMINATED_EXIT_CODE)))},
        ),
        _stage("pod-goes", when=[deleted, ended], then={"delete": True}),
    ]


def _stage(name: str, *, when: list[Object], then: Object, delay: Object | None = None) -> Object:
    spec: Object = {
        "resourceRef": {"apiGroup": "v1", "kind": "Pod"},
        "selector": {"matchExpressions": when},
        "next": then,
    }
    if delay:
        spec["delay"] = delay
    return {"apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": {"name": name}, "spec": spec}
