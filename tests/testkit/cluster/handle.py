"""What a test holds: a cluster, whichever kind it is, and what can be done to it."""

from __future__ import annotations

import unittest
from collections.abc import Mapping, Sequence
from pathlib import Path

from testkit.cluster.spec import NodeSpec
from testkit.kube import Kube


class UnavailableError(unittest.SkipTest):
    """This kind of cluster cannot do what the test asks for. pytest skips the test, with the reason."""


class ClusterHandle(Kube):
    """A cluster: the local one, or that of the current kubectl context (`CLUSTER=current`).

    What only a local cluster can do raises `UnavailableError` on any other, which skips the test.
    """

    local = False
    logs_folder: Path | None = None

    def cordon(self, node: str) -> None:
        """Let nothing more be scheduled on the node."""
        self.kubectl("cordon", node)

    def uncordon(self, node: str) -> None:
        """Undo `cordon` and `drain`."""
        self.kubectl("uncordon", node)

    def drain(self, node: str, *, timeout_seconds: int = 60) -> str:
        """Cordon the node and evict its pods, as an administrator would."""
        options = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", f"--timeout={timeout_seconds}s"]
        return self.kubectl("drain", node, *options, timeout=timeout_seconds + 10)

    def taint(self, node: str, *taints: str) -> None:
        """Add taints, like `key=value:NoExecute`."""
        self.kubectl("taint", "--overwrite", "node", node, *taints)

    def untaint(self, node: str, *taints: str) -> None:
        """Remove taints, in the same notation."""
        self.kubectl("taint", "node", node, *(f"{taint}-" for taint in taints))

    @property
    def nodes(self) -> Sequence[str]:
        """The names of its nodes."""
        return sorted(node["metadata"]["name"] for node in self.items("nodes"))

    @property
    def specs(self) -> Mapping[str, NodeSpec]:
        """The nodes as they were asked for, by name."""
        raise self._unavailable("tell how its nodes were asked for")

    @property
    def host_ip(self) -> str:
        """The address at which pods reach servers that the test starts on this machine."""
        raise self._unavailable("reach servers of this machine from pods")

    def load_image(
        self,
        name: str,
        *,
        entrypoint: Sequence[str] = (),  # noqa: ARG002
        env: Mapping[str, str] | None = None,  # noqa: ARG002
        user: str = "10001",  # noqa: ARG002
        workdir: str = "/",  # noqa: ARG002
        programs: Mapping[str, Path] | None = None,  # noqa: ARG002
    ) -> str:
        """Make an image of this machine's Python and the project's code known to every node; return its name."""
        raise self._unavailable(f"take the image {name} from this machine")

    def add_node(self, spec: NodeSpec) -> None:
        """Add a node and wait until it is ready."""
        raise self._unavailable(f"be given the node {spec.name}")

    def remove_node(self, name: str) -> None:
        """End a node and delete it from the API."""
        raise self._unavailable(f"remove node {name}")

    def lose_node(self, name: str) -> None:
        """Let a node die at once, with all that runs on it. Returns at once: the cluster notices seconds later."""
        raise self._unavailable(f"lose node {name}")

    def return_node(self, name: str) -> None:
        """Start a lost node again and wait until it is ready."""
        raise self._unavailable(f"start node {name}")

    def heal(self) -> None:
        """Undo what tests did to nodes. Does nothing on a cluster that is not ours."""

    def _unavailable(self, ability: str) -> UnavailableError:
        return UnavailableError(f"this cluster cannot {ability}: only the local one can (unset CLUSTER)")
