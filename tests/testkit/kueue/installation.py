"""Kueue on a cluster and off it again. Its manager runs as a pod, from a program that is built from its Go module."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from testkit import tools
from testkit.cluster import ClusterHandle
from testkit.kube import ApiError, Kube, KubectlError, Object, condition
from testkit.kueue.manifests import MANAGER, NAMESPACE, WEBHOOK_SERVICE, Certificate, Manifests
from testkit.pki import Authority
from testkit.waiting import wait_until

GROUP = "kueue.x-k8s.io"
_WEBHOOKS = ("mutatingwebhookconfigurations", "validatingwebhookconfigurations")


class KueueError(RuntimeError):
    """Kueue did not start. The message holds what its manager said."""


@contextlib.contextmanager
def installed(cluster: ClusterHandle, *, exempt: Sequence[str] = ("diffusion-operator",)) -> Iterator[None]:
    """Have Kueue on the cluster for the block."""
    install(cluster, exempt=exempt)
    try:
        yield
    finally:
        remove(cluster)


def install(cluster: ClusterHandle, *, exempt: Sequence[str] = ("diffusion-operator",)) -> None:
    """Install Kueue and wait until its webhooks answer. Pods in the `exempt` namespaces stay out of its hands.

    Raises `UnavailableError` on a cluster that takes no image from this machine, and `KueueError`.
    """
    program = tools.binary("kueue")
    version = tools.TOOLS["kueue"].version
    image = cluster.load_image(f"testkit/kueue:{version}", programs={"manager": program})
    manifests = Manifests(tools.source("kueue"), certificate=_certificate(), exempt=exempt)
    crds = manifests.crds()
    # The schemas are larger than what the client-side form of apply can keep in an annotation.
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=text(crds))
    cluster.wait_established(*(crd["metadata"]["name"] for crd in crds))
    cluster.apply(*manifests.manager(image=image))
    _await_manager(cluster)
    cluster.apply(*manifests.webhooks())
    await_webhooks(cluster, log=lambda: _log(cluster))


def remove(cluster: ClusterHandle) -> None:
    """Take Kueue off the cluster, with all its objects; pods that it held back stay so. Harmless without it."""
    for kind in _WEBHOOKS:
        for found in cluster.items(kind):
            if found["metadata"]["name"].startswith("kueue-"):
                cluster.api.delete(kind, found["metadata"]["name"])
    cluster.api.delete("deployments", MANAGER, namespace=NAMESPACE)
    crds = [crd for crd in cluster.items("customresourcedefinitions") if crd["spec"]["group"] == GROUP]
    for crd in crds:
        _release(cluster, crd)  # which nobody else does any more
        cluster.api.delete("customresourcedefinitions", crd["metadata"]["name"])
    for pod in cluster.items("pods", labels=f"{GROUP}/managed=true"):
        cluster.release(pod["metadata"]["name"], namespace=pod["metadata"]["namespace"])
    cluster.api.delete("namespaces", NAMESPACE)
    for crd in crds:
        cluster.wait_gone("customresourcedefinitions", crd["metadata"]["name"])
    cluster.wait_gone("namespaces", NAMESPACE)


def _release(cluster: ClusterHandle, crd: Object) -> None:
    kind = f"{crd['spec']['names']['plural']}.{GROUP}"
    for found in cluster.items(kind):
        if found["metadata"].get("finalizers"):
            with contextlib.suppress(ApiError):  # gone in the meantime
                name, namespace = found["metadata"]["name"], found["metadata"].get("namespace")
                cluster.api.patch(kind, name, {"metadata": {"finalizers": None}}, namespace=namespace)


def _certificate() -> Certificate:
    with tempfile.TemporaryDirectory(prefix="testkit-kueue-") as folder:
        authority = Authority(Path(folder))
        host = f"{WEBHOOK_SERVICE}.{NAMESPACE}.svc"
        pair = authority.issue("webhooks", subject=f"/CN={host}", names=[f"DNS:{host}"])
        return Certificate(
            authority=authority.root.certificate.read_bytes(),
            certificate=pair.certificate.read_bytes(),
            key=pair.key.read_bytes(),
        )


def _await_manager(cluster: ClusterHandle) -> None:
    def available(found: Object) -> bool:
        return bool(condition(found, "Available").get("status") == "True")

    try:
        cluster.wait_for("deployments", MANAGER, available, namespace=NAMESPACE, timeout=120, describe="Kueue's start")
    except TimeoutError as error:
        raise KueueError(f"{error}\n{_log(cluster)}") from error


def await_webhooks(kube: Kube, *, log: Callable[[], str]) -> None:
    """Ask for a pod, without making it, until the gate of Kueue is seen on it."""
    pod: Object = {
        "metadata": {"name": "probe", "labels": {f"{GROUP}/queue-name": "none"}},
        "spec": {"containers": [{"name": "main", "image": "none"}]},
    }
    refused = ""

    def gated() -> bool:
        nonlocal refused
        try:
            made = kube.api.request("POST", "/api/v1/namespaces/default/pods?dryRun=All", body=pod)
        except ApiError as error:
            refused = str(error)
            return False
        return {"name": f"{GROUP}/admission"} in made["spec"].get("schedulingGates", [])

    try:
        wait_until(gated, describe="Kueue's webhooks to answer", timeout=60, detail=lambda: refused)
    except TimeoutError as error:
        raise KueueError(f"{error}\n{log()}") from error


def _log(cluster: ClusterHandle) -> str:
    lines = []
    for pod in cluster.items("pods", namespace=NAMESPACE):
        lines.append(json.dumps(pod["status"].get("containerStatuses"), indent=1))
        with contextlib.suppress(KubectlError):  # a container that never started has none
            lines += cluster.logs(pod["metadata"]["name"], namespace=NAMESPACE).splitlines()[-15:]
    return "\n".join(lines)


def text(documents: Sequence[Object]) -> str:
    """Return the documents as one stream for kubectl."""
    return "\n---\n".join(json.dumps(document) for document in documents)
