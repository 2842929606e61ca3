"""A real multi-node Kubernetes cluster on one Linux machine, without Docker, and the same handle to any other cluster.

`sandbox` puts up the walls, `control` and `node` start programs within them, `local` puts them together and takes them
down, `handle` is what tests hold. Belongs here: whatever starts, breaks, mends or ends a cluster. Does not belong here:
anything about what the tests run on it.
"""

from testkit.cluster.current import CurrentCluster, open_current
from testkit.cluster.handle import ClusterHandle, UnavailableError
from testkit.cluster.images import CODE, Bind
from testkit.cluster.local import ClusterError, LocalCluster, take_down
from testkit.cluster.preflight import MachineUnfitError
from testkit.cluster.spec import NodeSpec, default_nodes

__all__ = [
    "CODE",
    "Bind",
    "ClusterError",
    "ClusterHandle",
    "CurrentCluster",
    "LocalCluster",
    "MachineUnfitError",
    "NodeSpec",
    "UnavailableError",
    "default_nodes",
    "open_current",
    "take_down",
]
