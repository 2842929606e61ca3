"""The local cluster: real Kubernetes on this machine, in walls of its own. One per machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from testkit import tools
from testkit.cluster import configs, images, preflight, record
from testkit.cluster.control import SERVER, Control
from testkit.cluster.handle import ClusterHandle
from testkit.cluster.node import Node
from testkit.cluster.record import ProcessId, Record
from testkit.cluster.sandbox import Sandbox
from testkit.cluster.spec import HOST_ADDRESS, NodeSpec, default_nodes
from testkit.locking import exclusive


class ClusterError(RuntimeError):
    """The cluster could not be started, or there is one already."""


class LocalCluster(ClusterHandle):
    """A local cluster. In a `with` block it ends with the block; its starter's death makes it stale.

    With `keep` it stays until `take_down`. What a killed starter left is cleaned up by the next start.
    """

    local = True

    def __init__(
        self, nodes: Sequence[NodeSpec] | None = None, *, keep: bool = False, binds: Sequence[images.Bind] = ()
    ) -> None:
        self._specs = list(default_nodes() if nodes is None else nodes)
        self._keep = keep
        self._binds = images.machine_binds(binds)
        self._nodes: dict[str, Node] = {}
        self.folder = record.state_folder()
        self.logs_folder = self.folder / "logs"
        self._sandbox = Sandbox(self.folder)
        self._record = Record(boot=record.boot_id(), folder=str(self.folder))
        self._programs: Mapping[str, Path] = {}
        self._control: Control | None = None

    @classmethod
    def attach(cls) -> Self:
        """Return the cluster that is up, whoever started it, with everything that can be done to it."""
        found = record.read()
        if found is None or found.stale or not found.ready:
            raise ClusterError("no local cluster is up: start one with `python -m testkit.cluster up`")
        cluster = cls([], keep=found.owner is None)
        cluster._record = found
        cluster.folder = Path(found.folder)
        cluster.logs_folder = cluster.folder / "logs"
        cluster._sandbox = Sandbox(cluster.folder, holder=found.holder)
        cluster._connect()
        cluster._control = Control(cluster._sandbox, programs=cluster._programs)
        for entry in found.nodes.values():
            if entry["spec"] is None:
                continue
            spec = NodeSpec(**entry["spec"])
            node = Node(spec, index=entry["index"], sandbox=cluster._sandbox, programs=cluster._programs)
            cluster._nodes[spec.name] = node
        return cluster

    def start(self) -> Self:
        """Start it and wait until every node is ready."""
        preflight.require(self.folder)
        if not self._specs:
            raise ClusterError("a cluster needs a node: give at least one NodeSpec")
        self._connect()
        with exclusive(record.lock_file()):
            _refuse_second()
            _clean()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, mode=0o755)
            try:
                self._start()
            except BaseException:
                self._end()
                raise
        return self

    def stop(self) -> None:
        """End it; nothing of it stays behind but its logs."""
        with exclusive(record.lock_file()):
            self._end()

    def check(self) -> None:
        """Raise when a part of the control plane has ended by itself."""
        if self._control is not None:
            self._control.check()

    @property
    def host_ip(self) -> str:
        """The address at which pods reach servers that the test starts on this machine."""
        return HOST_ADDRESS

    @property
    def specs(self) -> Mapping[str, NodeSpec]:
        """The nodes as they were asked for, by name."""
        return {name: node.spec for name, node in self._nodes.items()}

    def load_image(
        self,
        name: str,
        *,
        entrypoint: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        user: str = "10001",
        workdir: str = "/",
        programs: Mapping[str, Path] | None = None,
    ) -> str:
        """Make an image known to every node, later ones too; return its full name.

        Containers see this machine's programs, this Python and the project's code (at `images.CODE`), read-only. Give
        the name a tag other than `latest`, or the kubelet asks a registry for it. `programs` (name in the root folder
        to file) are copied into the image: those that containers do not see anyway.
        """
        image = images.Image(
            name,
            entrypoint=tuple(entrypoint),
            env=images.python_env(env),
            user=user,
            workdir=workdir,
            programs=programs or {},
        )
        self._load(image)
        return image.reference

    def add_node(self, spec: NodeSpec) -> None:
        """Add a node and wait until it is ready."""
        self._add([spec])

    def remove_node(self, name: str) -> None:
        """End a node and delete it from the API."""
        node = self._node(name)
        node.remove()
        self.api.delete("nodes", name)
        del self._nodes[name]
        # The number stays taken; the name is free.
        index = node.addressing.index
        self._record.nodes.pop(name)
        self._record.nodes[f"removed {index}"] = {"index": index, "spec": None}
        record.write(self._record)

    def lose_node(self, name: str) -> None:
        """Let a node die at once, with all that runs on it. Returns at once: the cluster notices seconds later."""
        self._node(name).lose()

    def return_node(self, name: str) -> None:
        """Start a lost node again and wait until it is ready."""
        self._node(name).bring_back(self)

    def heal(self) -> None:
        """Undo what a test did to nodes: bring back, uncordon, give each the taints of its specification."""
        for node in list(self._nodes.values()):
            if node.lost:
                node.bring_back(self)
            spec = self.get("nodes", node.name)["spec"]
            taints = [{"key": t.key, "value": t.value, "effect": t.effect} for t in node.spec.parsed_taints]
            foreign = [t for t in spec.get("taints", []) if not t["key"].startswith("node.kubernetes.io/")]
            # An empty value is left out by the API server.
            if spec.get("unschedulable") or [{"value": "", **taint} for taint in foreign] != taints:
                self.api.patch("nodes", node.name, {"spec": {"unschedulable": None, "taints": taints}})

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        # Written before anything is made, so that whoever comes next knows that there is something to undo.
        self._record.owner = None if self._keep else ProcessId.of(os.getpid())
        record.write(self._record)
        self._record.holder = self._sandbox.create(
            pause=self._programs["pause"], needed=[Path(bind.source) for bind in self._binds]
        )
        record.write(self._record)
        control = self._control = Control(self._sandbox, programs=self._programs)
        control.start_server()
        self._load(images.Image(configs.PAUSE, entrypoint=("/pause",), programs={"pause": self._programs["pause"]}))
        nodes = self._prepare(self._specs)
        control.await_server()
        control.start_controllers()
        self._join(nodes)
        if nodes:
            control.start_network(self, node=nodes[0].name)
        self._await(nodes)
        control.check()
        self._record.ready = True
        record.write(self._record)

    def _end(self) -> None:
        if hasattr(self, "api"):
            self.close()
        found = record.read()
        # Somebody may have taken ours down and started another, which is not ours to end.
        if found is None or found.holder in {None, self._record.holder}:
            _clean()
        self._nodes.clear()
        self._control = None

    def _add(self, specs: Sequence[NodeSpec]) -> None:
        nodes = self._prepare(specs)
        self._join(nodes)
        self._await(nodes)

    def _prepare(self, specs: Sequence[NodeSpec]) -> list[Node]:
        if self._control is None:
            raise ClusterError("the cluster is not running: use it in a `with` block or call start()")
        # Another process may have attached and added nodes.
        self._record.nodes = (record.read() or self._record).nodes
        made: list[Node] = []
        for spec in specs:
            if spec.name in self._nodes:
                raise ClusterError(f"there is a node {spec.name} already: choose another name")
            # Numbers are not used twice: addresses of a removed node may still be remembered somewhere.
            index = max((entry["index"] for entry in self._record.nodes.values()), default=0) + 1
            self._record.nodes[spec.name] = {"index": index, "spec": asdict(spec)}
            node = Node(spec, index=index, sandbox=self._sandbox, programs=self._programs)
            node.prepare(authority=self._control.authority, server=SERVER, binds=self._binds)
            node.start_runtime()
            self._nodes[spec.name] = node
            made.append(node)
        record.write(self._record)
        return made

    def _join(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.await_runtime()
            for archive in sorted(self._images.iterdir()):
                node.load(archive.read_bytes())
            node.start_kubelet()

    def _await(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.await_ready(self)

    def _load(self, image: images.Image) -> None:
        archive = images.archive(image)
        # Kept on disk, for nodes that come later and for processes that attach.
        kept = self._images / f"{image.reference.replace('/', '_')}.tar"
        if kept.exists() and kept.read_bytes() == archive:
            return
        self._images.mkdir(exist_ok=True)
        kept.write_bytes(archive)
        for node in self._nodes.values():
            if not node.lost:
                node.load(archive)

    @property
    def _images(self) -> Path:
        return self.folder / "images"

    def _connect(self) -> None:
        self._programs = tools.ensure(tools.CLUSTER)
        super().__init__(
            kubectl=self._programs["kubectl"], kubeconfig=self.folder / "admin.conf", cache=self.folder / "kubectl"
        )

    def _node(self, name: str) -> Node:
        if name not in self._nodes:
            raise ClusterError(f"there is no node {name}; there are {', '.join(self._nodes) or 'none'}")
        return self._nodes[name]


def take_down(*, force: bool = False) -> bool:
    """End the cluster of this machine that was kept or left behind. Return whether there was one.

    One that another process holds, and will end itself, is left alone without `force`.
    """
    if os.geteuid() != 0:
        raise ClusterError("a local cluster is root's, so only root can end it: run with sudo")
    with exclusive(record.lock_file()):
        found = record.read()
        held = found is not None and found.owner is not None and not found.stale
        if held and found is not None and found.owner != ProcessId.of(os.getpid()) and not force:
            raise ClusterError(
                f"the cluster is in use by process {found.owner.pid if found.owner else 0}: wait for it, or use --force"
            )
        _clean()
    return found is not None


def _refuse_second() -> None:
    found = record.read()
    if found is None or found.stale:
        return
    owner = f"process {found.owner.pid}" if found.owner else "`python -m testkit.cluster up`"
    raise ClusterError(
        f"a local cluster is up already, started by {owner} (state in {found.folder}); there can be one per machine: "
        "use it with `CLUSTER=current`, or end it with `python -m testkit.cluster down`"
    )


def _clean() -> None:
    """Remove everything of the machine's cluster but its logs, whatever state it is in."""
    found = record.read()
    folder = Path(found.folder) if found else record.state_folder()
    Sandbox(folder).destroy()
    record.forget()
    if folder.exists():
        for path in folder.iterdir():
            if path.name != "logs":
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
