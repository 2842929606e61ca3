"""What a test does with an API server: kubectl, objects, waiting for conditions, and a namespace of its own."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from testkit.kubeapi import ApiError, KubeApi, Object
from testkit.waiting import wait_until

__all__ = ["ApiError", "Kube", "KubectlError", "Object", "condition"]


class KubectlError(RuntimeError):
    """kubectl answered with an error: the command and what it said."""


class Kube:
    """One API server, seen with the rights of one kubeconfig."""

    def __init__(self, *, kubectl: Path, kubeconfig: Path, cache: Path | None = None) -> None:
        """`cache` is where kubectl remembers what the server serves; by default where it does for its user."""
        self.kubeconfig = kubeconfig
        self._options = [f"--kubeconfig={kubeconfig}", *([f"--cache-dir={cache}"] if cache else [])]
        self.kubectl_path = kubectl
        self.api = KubeApi(kubectl=kubectl, kubeconfig=kubeconfig)

    def kubectl(self, *args: str | Path, input: str | None = None, timeout: float = 120) -> str:  # noqa: A002
        """Run kubectl with `input` on its standard input; return its output, or raise `KubectlError` with its words."""
        command = [str(self.kubectl_path), *self._options, *map(str, args)]
        try:
            done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise KubectlError(f"kubectl {' '.join(map(str, args))}: no answer within {timeout:g} s") from error
        if done.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(map(str, args))} (exit {done.returncode}): {done.stderr.strip()}")
        return done.stdout

    def apply(self, *manifests: Object | str, namespace: str | None = None) -> str:
        """`kubectl apply` of manifests: dictionaries, or YAML or JSON text."""
        documents = [item if isinstance(item, str) else json.dumps(item) for item in manifests]
        within = ["--namespace", namespace] if namespace else []
        return self.kubectl("apply", *within, "-f", "-", input="\n---\n".join(documents))

    def get(self, kind: str, name: str, *, namespace: str | None = None) -> Object:
        """Return the object; raises `ApiError` (reason NotFound) where there is none."""
        return self.api.get(kind, name, namespace=namespace)

    def find(self, kind: str, name: str, *, namespace: str | None = None) -> Object | None:
        """Return the object, or None where there is none."""
        return self.api.find(kind, name, namespace=namespace)

    def items(
        self, kind: str, *, namespace: str | None = None, labels: str | None = None, fields: str | None = None
    ) -> list[Object]:
        """Return all objects of a kind, by label and field selector."""
        query = {key: value for key, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}
        return self.api.items(kind, namespace=namespace, query=query)

    def logs(self, pod: str, *, namespace: str, container: str | None = None, previous: bool = False) -> str:
        """Return a pod's log so far. Raises `ApiError` (BadRequest) while its container has not started."""
        query = {"previous": str(previous).lower(), **({"container": container} if container else {})}
        path = self.api.resource("pods").path(namespace=namespace, name=pod, subresource="log")
        return str(self.api.request("GET", f"{path}?{urlencode(query)}", accept="*/*"))

    def events(self, *, namespace: str, about: str | None = None) -> list[str]:
        """Return events as lines `Type Reason object: message`, oldest first."""
        found = self.items("events", namespace=namespace, fields=f"involvedObject.name={about}" if about else None)
        found.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
        return [
            f"{event.get('type')} {event.get('reason')} {event['involvedObject'].get('name')}: {event.get('message')}"
            for event in found
        ]

    def wait_for(
        self,
        kind: str,
        name: str,
        until: Callable[[Object], Any],
        *,
        namespace: str | None = None,
        timeout: float = 60,
        describe: str = "",
    ) -> Object:
        """Wait until the object exists and `until(object)` is true; return the object.

        On timeout the error holds the object's status, its events, and what its pods are doing.
        """

        def probe() -> Object | None:
            found = self.find(kind, name, namespace=namespace)
            return found if found is not None and until(found) else None

        def detail() -> str:
            found = self.find(kind, name, namespace=namespace)
            status = json.dumps((found or {}).get("status"), indent=1)[:4000] if found else "(does not exist)"
            lines = self.events(namespace=namespace, about=name)[-10:] if namespace else []
            pods = self._doing(name, namespace=namespace) if namespace else []
            return "\n".join([f"{kind} {name}: {status}", *lines, *pods])

        what = describe or "the awaited condition"
        found = wait_until(probe, describe=f"{what} of {kind} {name}", timeout=timeout, detail=detail)
        if found is None:  # wait_until returns only what is true
            raise AssertionError(f"{kind} {name} vanished")
        return found

    def _doing(self, prefix: str, *, namespace: str) -> list[str]:
        """Return a few lines about each pod whose name starts so: phase, container states, events, the log's end."""
        lines: list[str] = []
        for pod in self.items("pods", namespace=namespace):
            name = pod["metadata"]["name"]
            if not name.startswith(prefix):
                continue
            states = [entry.get("state") for entry in pod["status"].get("containerStatuses", [])]
            lines += [f"pod {name}: {pod['status'].get('phase')} {json.dumps(states)}"]
            lines += self.events(namespace=namespace, about=name)[-5:]
            with contextlib.suppress(ApiError):  # it may have several containers, or not have started
                lines += self.logs(name, namespace=namespace).splitlines()[-15:]
        return lines

    def wait_established(self, *crds: str, timeout: float = 60) -> None:
        """Wait until the kinds of CRDs are served. `kubectl wait` gives up where a new one has no conditions yet."""
        for name in crds:
            self.wait_for(
                "customresourcedefinitions",
                name,
                lambda found: condition(found, "Established").get("status") == "True",
                timeout=timeout,
                describe="establishment",
            )

    def wait_gone(self, kind: str, name: str, *, namespace: str | None = None, timeout: float = 60) -> None:
        """Wait until the object is gone."""
        wait_until(
            lambda: self.find(kind, name, namespace=namespace) is None,
            describe=f"{kind} {name} to be gone",
            timeout=timeout,
            detail=lambda: json.dumps(self.find(kind, name, namespace=namespace), indent=1)[:4000],
        )

    def wait_phase(self, pod: str, *phases: str, namespace: str, timeout: float = 60) -> Object:
        """Wait until the pod is in one of `phases`; return it. Ends at once where it has ended in another."""

        def reached(found: Object) -> bool:
            phase = found.get("status", {}).get("phase")
            if phase in {"Succeeded", "Failed"} and phase not in phases:
                raise AssertionError(f"pod {pod} is {phase}, not {' or '.join(phases)}: {json.dumps(found['status'])}")
            return phase in phases

        return self.wait_for(
            "pods", pod, reached, namespace=namespace, timeout=timeout, describe=f"phase {'/'.join(phases)}"
        )

    def wait_log(self, pod: str, text: str, *, namespace: str, timeout: float = 60) -> str:
        """Wait until the pod's log holds `text`; return the log."""

        def probe() -> str:
            with contextlib.suppress(ApiError):  # there is no log before the container starts
                log = self.logs(pod, namespace=namespace)
                return log if text in log else ""
            return ""

        return wait_until(probe, describe=f"{text!r} in the log of pod {pod}", timeout=timeout)

    @contextlib.contextmanager
    def namespace(
        self, prefix: str = "test", *, security: str = "restricted", labels: Mapping[str, str] | None = None
    ) -> Iterator[str]:
        """Make a namespace with a unique name in which Pod Security is enforced, and delete it at the end.

        Deletion is started, not awaited: names are unique, so nobody needs to wait for it.
        """
        stem = re.sub(r"[^a-z0-9]+", "-", prefix.lower()).strip("-")[:40]
        name = f"{stem}-{uuid.uuid4().hex[:6]}"
        marks = {"pod-security.kubernetes.io/enforce": security, **(labels or {})}
        self.api.create("namespaces", {"metadata": {"name": name, "labels": marks}})
        try:
            yield name
        finally:
            # Pods end at once instead of using up their grace, so that the next test finds their resources free.
            for pod in self.items("pods", namespace=name):
                self.api.delete("pods", pod["metadata"]["name"], namespace=name, grace_seconds=1)
                self.release(pod["metadata"]["name"], namespace=name)
            self.api.delete("namespaces", name)

    def release(self, pod: str, *, namespace: str) -> None:
        """Take off the finalizers by which a test kept a pod's object after its end; harmless where it is gone."""
        if (self.find("pods", pod, namespace=namespace) or {}).get("metadata", {}).get("finalizers"):
            with contextlib.suppress(ApiError):
                self.api.patch("pods", pod, {"metadata": {"finalizers": None}}, namespace=namespace)

    def close(self) -> None:
        """End the helper process behind `api`."""
        self.api.close()


def condition(found: Object, kind: str) -> Object:
    """Return the condition of an object's status by its type; {} where it has none."""
    conditions: Sequence[Object] = found.get("status", {}).get("conditions") or []
    return next((entry for entry in conditions if entry["type"] == kind), {})
