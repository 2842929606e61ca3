"""The cluster of the current kubectl context, for `CLUSTER=current`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from testkit import tools
from testkit.cluster.handle import ClusterHandle


class NoCurrentClusterError(RuntimeError):
    """kubectl has no current context."""


class CurrentCluster(ClusterHandle):
    """Whatever kubectl speaks to: kind, minikube, a real one, or a local cluster that is kept."""

    def __init__(self) -> None:
        # The context of a kubeconfig that is in use may change under us; the file is taken as it is named now.
        named = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
        kubeconfig = Path(named.split(os.pathsep)[0])
        if not kubeconfig.exists():
            raise NoCurrentClusterError(
                f"CLUSTER=current is set but there is no kubeconfig at {kubeconfig}: set KUBECONFIG, or unset CLUSTER"
            )
        program = shutil.which("kubectl")
        super().__init__(kubectl=Path(program) if program else tools.binary("kubectl"), kubeconfig=kubeconfig)
