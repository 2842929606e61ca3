"""One node: containerd and a kubelet, with addresses, state and control group of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from testkit.cluster import cgroups, configs, images
from testkit.cluster.record import ProcessId
from testkit.cluster.sandbox import Sandbox
from testkit.cluster.spec import Addressing, NodeSpec
from testkit.kube import Kube, Object, condition
from testkit.pki import Authority, write_kubeconfig
from testkit.process import flags
from testkit.waiting import wait_until


class NodeError(RuntimeError):
    """A node did not come up. The message holds the end of its log."""


class Node:
    """One node. Created by the cluster, which starts the parts of all nodes side by side."""

    def __init__(self, spec: NodeSpec, *, index: int, sandbox: Sandbox, programs: Mapping[str, Path]) -> None:
        self.spec = spec
        self.addressing = Addressing(index=index)
        self.folder = sandbox.folder / "nodes" / str(index)
        self.lost = False
        self._sandbox = sandbox
        self._programs = programs
        self._processes: dict[str, ProcessId] = {}

    @property
    def name(self) -> str:
        """Its name in the cluster."""
        return self.spec.name

    def prepare(self, *, authority: Authority, server: str, binds: Iterable[images.Bind]) -> None:
        """Write everything that its programs read, and give it its address."""
        (self.folder / "cni").mkdir(parents=True, exist_ok=True)
        subject = f"/O=system:nodes/CN=system:node:{self.name}"
        names = [f"IP:{self.addressing.node}", f"DNS:{self.name}"]
        pair = authority.issue(f"node-{self.name}", subject=subject, names=names)
        write_kubeconfig(self._kubeconfig, server=server, authority=authority.root.certificate, pair=pair)
        default = json.loads(
            subprocess.run([self._programs["ctr"], "oci", "spec"], capture_output=True, check=True).stdout
        )
        (self.folder / "base-spec.json").write_text(json.dumps(images.base_spec(default, binds=list(binds))))
        (self.folder / "containerd.toml").write_text(configs.containerd(self.folder, programs=self._programs))
        (self.folder / "cni" / "10-pods.conflist").write_text(configs.cni(self.folder, addressing=self.addressing))
        text = configs.kubelet(
            self.spec,
            folder=self.folder,
            addressing=self.addressing,
            authority=authority.root.certificate,
            serving=pair,
        )
        (self.folder / "kubelet.yaml").write_text(text)
        self._sandbox.run("ip", "address", "add", f"{self.addressing.node}/32", "dev", "lo")

    def start_runtime(self) -> None:
        """Start containerd; it needs nothing else of the cluster."""
        self._sandbox.hierarchies.create(f"{cgroups.ROOT}/{configs.group(self.spec)}")
        shim = self._programs["containerd-shim-runc-v2"].parent
        command = [str(self._programs["containerd"]), "--config", str(self.folder / "containerd.toml")]
        self._spawn("containerd", command, environment={"PATH": f"{shim}{os.pathsep}{os.environ['PATH']}"})

    def await_runtime(self) -> None:
        """Wait until containerd serves its interface for kubelets."""

        def serves() -> bool:
            self._check("containerd")
            done = self._ctr("version", check=False)
            return done.returncode == 0

        wait_until(serves, describe=f"containerd of node {self.name}")

    def load(self, archive: bytes) -> None:
        """Load an image archive."""
        done = self._ctr("images", "import", "--local", "--snapshotter", "native", "-", stdin=archive, check=False)
        if done.returncode != 0:
            raise NodeError(f"node {self.name} did not take the image: {done.stderr.decode().strip()[-500:]}")

    def start_kubelet(self) -> None:
        """Start the kubelet, which registers the node."""
        options = {
            "config": self.folder / "kubelet.yaml",
            "kubeconfig": self._kubeconfig,
            "hostname-override": self.name,
            "node-ip": self.addressing.node,
            "root-dir": self.folder / "kubelet",
        }
        self._spawn("kubelet", [str(self._programs["kubelet"]), *flags(options)])

    def await_ready(self, kube: Kube, *, timeout: float = 90) -> None:
        """Wait until the API server sees the node ready, with its labels and GPUs."""

        def ready(found: Object) -> bool:
            self._check("containerd")
            self._check("kubelet")
            self._dress(kube, found)
            usable = condition(found, "Ready").get("status") == "True" and not _unreachable(found)
            wanted = str(self.spec.gpus)
            offered = found["status"].get("allocatable", {}).get(self.spec.gpu_resource, "0")
            return usable and offered == wanted

        try:
            kube.wait_for("nodes", self.name, ready, timeout=timeout, describe="readiness")
        except TimeoutError as error:
            raise NodeError(f"{error}\n{self._log('kubelet')}") from error

    def lose(self) -> None:
        """Cut its network, then end all of it at once, containers included: nothing is said to anybody."""
        self.lost = True
        self._sandbox.run("ip", "link", "set", self.addressing.bridge, "down", check=False)
        self._sandbox.run("ip", "route", "add", "blackhole", self.addressing.pods, check=False)
        self._sandbox.kill(configs.group(self.spec))

    def bring_back(self, kube: Kube) -> None:
        """Start it again with what was on its disk."""
        self._sandbox.run("ip", "route", "delete", "blackhole", self.addressing.pods, check=False)
        self._sandbox.run("ip", "link", "set", self.addressing.bridge, "up", check=False)
        self.start_runtime()
        self.await_runtime()
        self.start_kubelet()
        self.await_ready(kube)
        self.lost = False

    def remove(self) -> None:
        """End it for good."""
        self._sandbox.kill(configs.group(self.spec))
        self._sandbox.run("ip", "link", "delete", self.addressing.bridge, check=False)
        self._sandbox.run("ip", "address", "delete", f"{self.addressing.node}/32", "dev", "lo", check=False)
        self._sandbox.run("ip", "route", "delete", "blackhole", self.addressing.pods, check=False)

    @property
    def _kubeconfig(self) -> Path:
        return self.folder / "kubelet.conf"

    def _dress(self, kube: Kube, found: Object) -> None:
        """Give the node the labels and GPUs that a cloud and a device plugin would, unless it has them."""
        labels = found["metadata"].get("labels", {})
        missing = {key: value for key, value in self.spec.labels.items() if labels.get(key) != value}
        if missing:
            kube.api.patch("nodes", self.name, {"metadata": {"labels": missing}})
        count = str(self.spec.gpus)
        # Asked for on every look: a kubelet that starts anew may set the count of GPUs that it does not know to nought.
        if found["status"].get("capacity", {}).get(self.spec.gpu_resource, "0") != count:
            amounts = {self.spec.gpu_resource: count}
            body = {"status": {"capacity": amounts, "allocatable": amounts}}
            kube.api.patch("nodes", self.name, body, subresource="status")

    def _spawn(self, program: str, command: list[str], *, environment: Mapping[str, str] | None = None) -> None:
        self._processes[program] = self._sandbox.spawn(
            f"{program}-{self.name}", command, group=f"{configs.group(self.spec)}/system", environment=environment
        )

    def _check(self, program: str) -> None:
        process = self._processes.get(program)
        if process is not None and not process.alive:
            raise NodeError(f"{program} of node {self.name} ended; the end of its log:\n{self._log(program)}")

    def _log(self, program: str) -> str:
        path = self._sandbox.logs / f"{program}-{self.name}.log"
        return f"{path}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])

    def _ctr(self, *args: str, stdin: bytes | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        address = str(self.folder / "containerd.sock")
        command = [str(self._programs["ctr"]), "--address", address, "--namespace", "k8s.io", *args]
        return subprocess.run(command, input=stdin, capture_output=True, check=check, timeout=60)


def _unreachable(found: Object) -> bool:
    taints = found.get("spec", {}).get("taints", [])
    return any(
        taint["key"].startswith("node.kubernetes.io/") for taint in taints if "unschedulable" not in taint["key"]
    )
