"""Which program is built from which Go package, and what its build needs. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MODULES = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Module:
    """A pinned Go module of this folder. `source` is the module that its programs' version is taken from."""

    folder: str
    source: str = ""
    tags: str = ""
    # None leaves it to Go, which uses C where there is a compiler.
    cgo: bool | None = None
    # `{version}` stands for the version of `source`.
    ldflags: str = "-s -w"
    # Distribution packages without which it does not build.
    packages: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder with go.mod."""
        return MODULES / self.folder

    def version(self, source: str = "") -> str:
        """Return the version that go.mod requires of `source` (by default the module's own source)."""
        wanted = source or self.source
        if not wanted:
            return "v1"
        text = (self.path / "go.mod").read_text()
        found = re.search(rf"^(?:require)?\s*{re.escape(wanted)}\s+(v\S+)", text, re.MULTILINE)
        if found is None:
            raise LookupError(
                f"{self.path / 'go.mod'} does not require {wanted}: add it with `go get {wanted}@VERSION`"
            )
        return found[1]

    def go_version(self) -> tuple[int, ...]:
        """Return the oldest Go that go.mod accepts."""
        found = re.search(r"^go (\d+(?:\.\d+)*)", (self.path / "go.mod").read_text(), re.MULTILINE)
        if found is None:
            raise LookupError(f"{self.path / 'go.mod'} has no `go` line: add the version it is built with")
        return tuple(int(part) for part in found[1].split("."))

    def digest(self) -> str:
        """Return a short digest of everything that decides what is built, so that no stale build is served."""
        state = hashlib.sha256(repr((self.tags, self.cgo, self.ldflags)).encode())
        for file in sorted(self.path.iterdir()):
            if file.suffix in {".mod", ".sum", ".go"}:
                state.update(file.name.encode() + b"\0" + file.read_bytes())
        return state.hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One program: the Go package it is built from, within a pinned module."""

    name: str
    module: Module
    package: str
    # Where the program's version is not that of the module's own source.
    source: str = field(default="")

    @property
    def version(self) -> str:
        """The version of the source that is pinned."""
        return self.module.version(self.source)

    @property
    def key(self) -> str:
        """The name of its folder in the cache."""
        return f"{self.name}-{self.version}-{self.module.digest()}"


_KUBERNETES = Module(
    folder="kubernetes",
    source="k8s.io/kubernetes",
    # Without it the servers say v0.0.0-master, and clients warn about the skew.
    ldflags="-s -w -X k8s.io/component-base/version.gitVersion={version}",
)
_ETCD = Module(folder="etcd", source="go.etcd.io/etcd/server/v3")
_CONTAINERD = Module(folder="containerd", source="github.com/containerd/containerd/v2")
_RUNC = Module(
    folder="runc",
    source="github.com/opencontainers/runc",
    tags="seccomp",
    cgo=True,
    packages=("libseccomp-dev", "pkg-config", "gcc"),
)
_COREDNS = Module(folder="coredns", source="github.com/coredns/coredns")
_PAUSE = Module(folder="pause", cgo=False)
_VERSITYGW = Module(folder="versitygw", source="github.com/versity/versitygw")
_KUEUE = Module(
    folder="kueue",
    source="sigs.k8s.io/kueue",
    ldflags="-s -w -X sigs.k8s.io/kueue/pkg/version.GitVersion={version}",
)
_KWOK = Module(folder="kwok", source="sigs.k8s.io/kwok")
# The peers that bench/operator measures beside us: Trainer, and the JobSet that it builds on.
_KUBEFLOW = Module(folder="kubeflow", source="github.com/kubeflow/trainer/v2")
_JOBSET = "sigs.k8s.io/jobset"
_CNI = "github.com/containernetworking/plugins"


def _catalog() -> Mapping[str, Tool]:
    kubernetes = ("kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet")
    containerd = ("containerd", "containerd-shim-runc-v2", "ctr")
    plugins = ("ipam/host-local", "main/bridge", "main/loopback")
    tools = [Tool(name=name, module=_KUBERNETES, package=f"{_KUBERNETES.source}/cmd/{name}") for name in kubernetes]
    tools += [Tool(name=name, module=_CONTAINERD, package=f"{_CONTAINERD.source}/cmd/{name}") for name in containerd]
    tools += [
        Tool(name=path.split("/")[1], module=_CONTAINERD, package=f"{_CNI}/plugins/{path}", source=_CNI)
        for path in plugins
    ]
    tools += [
        Tool(name="etcd", module=_ETCD, package=_ETCD.source),
        Tool(name="runc", module=_RUNC, package=_RUNC.source),
        Tool(name="coredns", module=_COREDNS, package=_COREDNS.source),
        Tool(name="pause", module=_PAUSE, package="."),
        Tool(name="versitygw", module=_VERSITYGW, package=f"{_VERSITYGW.source}/cmd/versitygw"),
        Tool(name="kueue", module=_KUEUE, package=f"{_KUEUE.source}/cmd/kueue"),
        Tool(name="kwok", module=_KWOK, package=f"{_KWOK.source}/cmd/kwok"),
        Tool(name="trainer", module=_KUBEFLOW, package=f"{_KUBEFLOW.source}/cmd/trainer-controller-manager"),
        Tool(name="jobset", module=_KUBEFLOW, package=_JOBSET, source=_JOBSET),
    ]
    return {tool.name: tool for tool in tools}


TOOLS: Mapping[str, Tool] = _catalog()
CONTROL_PLANE = ("etcd", "kube-apiserver", "kubectl")
CNI_PLUGINS = ("bridge", "host-local", "loopback")
NODE = ("kubelet", "containerd", "containerd-shim-runc-v2", "ctr", "runc", "pause", *CNI_PLUGINS)
CLUSTER = (*CONTROL_PLANE, "kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns", *NODE)
