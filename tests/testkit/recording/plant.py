"""The control plane that situations are made on; all of it is private to the process."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from testkit import kueue, tools
from testkit.controlplane import ControlPlane
from testkit.kube import Kube
from testkit.kwok import FakeNodes, Scheduler
from testkit.process import ServerProcess, flags

NAMESPACE, OTHERS = "team-a", "team-b"
LEASE_SECONDS = 40
"""A node that gives no sign of life for so long is not ready."""
CONTROLLERS = (
    "node-lifecycle-controller",
    "persistentvolume-binder-controller",
    "resourcequota-controller",
    "serviceaccount-controller",
)
"""Those that make what pods wait for: taints of nodes that are not well, bound claims, quota that is counted."""
SECURITY = {"pod-security.kubernetes.io/enforce": "restricted"}


@contextlib.contextmanager
def plant(*, queues: bool) -> Iterator[Kube]:
    """Start everything, with Kueue where there are `queues`; about ten seconds."""
    # Service accounts are asked for here, since there is somebody who makes each namespace its default one.
    with ControlPlane(options={"disable-admission-plugins": ""}) as plane, contextlib.ExitStack() as stack:
        kube = plane.kube
        stack.enter_context(_controllers(kube))
        stack.enter_context(Scheduler(kube))
        stack.enter_context(FakeNodes(kube, lease_seconds=LEASE_SECONDS))
        for name in (NAMESPACE, OTHERS):
            kube.api.create("namespaces", {"metadata": {"name": name, "labels": SECURITY}})
            kube.wait_for("serviceaccounts", "default", bool, namespace=name)
        if queues:
            stack.enter_context(kueue.KueueManager(kube))
        yield kube


@contextlib.contextmanager
def _controllers(kube: Kube) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="testkit-controllers-"))
    options = {
        "kubeconfig": kube.kubeconfig,
        "authentication-kubeconfig": kube.kubeconfig,
        "authorization-kubeconfig": kube.kubeconfig,
        "controllers": ",".join(CONTROLLERS),
        "leader-elect": False,
        "secure-port": 0,
        "node-monitor-period": "1s",
        "node-monitor-grace-period": f"{LEASE_SECONDS}s",
    }
    program = tools.binary("kube-controller-manager")
    process = ServerProcess([program, *flags(options)], log=folder / "kube-controller-manager.log")
    try:
        yield
    finally:
        process.stop(grace_seconds=0)
        shutil.rmtree(folder, ignore_errors=True)
