"""A real Kueue on a test's cluster: its own manager, CRDs and webhooks, taken from its Go module.

Belongs here: installing and removing it, and builders of the objects that say who may have how much. Does not belong
here: anything that stands in for Kueue, or that knows diffusion-operator's policies.
"""

from testkit.kueue.beside import KueueManager
from testkit.kueue.installation import KueueError, install, installed, remove
from testkit.kueue.objects import cluster_queue, local_queue, priority_class, resource_flavor
from testkit.kueue.workloads import admitted, evicted, waiting

__all__ = [
    "KueueError",
    "KueueManager",
    "admitted",
    "cluster_queue",
    "evicted",
    "install",
    "installed",
    "local_queue",
    "priority_class",
    "remove",
    "resource_flavor",
    "waiting",
]
