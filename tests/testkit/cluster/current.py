"""The cluster of the current kubectl context, for `CLUSTER=current`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from testkit import tools
from testkit.cluster import record
from testkit.cluster.handle import ClusterHandle
from testkit.cluster.local import LocalCluster


class NoCurrentClusterError(RuntimeError):
    """kubectl has no current context."""


class CurrentCluster(ClusterHandle):
    """Whatever kubectl speaks to: kind, minikube, a real one, or a local cluster that is kept."""

    def __init__(self, kubeconfig: Path | None = None) -> None:
        kubeconfig = kubeconfig or current_kubeconfig()
        if not kubeconfig.exists():
            raise NoCurrentClusterError(
                f"CLUSTER=current is set but there is no kubeconfig at {kubeconfig}: set KUBECONFIG, or unset CLUSTER"
            )
        program = shutil.which("kubectl")
        super().__init__(kubectl=Path(program) if program else tools.binary("kubectl"), kubeconfig=kubeconfig)


def current_kubeconfig() -> Path:
    """Return the kubeconfig that kubectl would read: the first of KUBECONFIG, or the user's."""
    named = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    return Path(named.split(os.pathsep)[0])


def open_current() -> ClusterHandle:
    """Return the current context's cluster; with all abilities where it is the local one that is kept."""
    kubeconfig = current_kubeconfig()
    found = record.read()
    if found is not None and kubeconfig.resolve() == Path(found.folder, "admin.conf").resolve():
        return LocalCluster.attach()
    return CurrentCluster(kubeconfig)
