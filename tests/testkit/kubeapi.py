"""Reading and writing objects of an API server as plain dictionaries, quickly and with any kubeconfig.

A process of kubectl costs a tenth of a second of a core, too much for polling. One `kubectl proxy` on a unix socket
does the authentication, whatever kind the kubeconfig asks for, and requests through it cost a few milliseconds.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from testkit.process import ServerProcess, flags
from testkit.waiting import wait_until

Object = dict[str, Any]


class ApiError(RuntimeError):
    """The API server refused. `status` is the HTTP code, `reason` the API's (NotFound, Forbidden, Invalid, ...)."""

    def __init__(self, message: str, *, status: int, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Where objects of one kind are served."""

    prefix: str
    plural: str
    namespaced: bool

    def path(self, *, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Return the path of an object, or of the collection without `name`; of all namespaces without `namespace`."""
        parts = [self.prefix]
        if self.namespaced and namespace:
            parts += ["namespaces", quote(namespace)]
        parts.append(self.plural)
        parts += [quote(part) for part in (name, subresource) if part]
        return "/".join(parts)


class KubeApi:
    """Requests to one API server through `kubectl proxy`, which starts with the first of them."""

    def __init__(self, *, kubectl: Path, kubeconfig: Path) -> None:
        self._kubectl = kubectl
        self._kubeconfig = kubeconfig
        self._scratch: Path | None = None
        self._proxy: ServerProcess | None = None
        self._resources: dict[str, Resource] = {}

    def request(
        self, method: str, path: str, *, body: Any = None, content_type: str = "application/json", accept: str = ""
    ) -> Any:
        """Send one request and return the decoded answer. Raises `ApiError` for anything but success."""
        connection = _UnixConnection(self._socket())
        payload = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type, "Accept": accept or "application/json"}
        try:
            connection.request(method, path, body=payload, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status >= http.HTTPStatus.BAD_REQUEST:
            raise _error(f"{method} {path}", status=answer.status, text=text)
        return json.loads(text) if "json" in (answer.headers.get("Content-Type") or "") else text

    def resource(self, kind: str) -> Resource:
        """Return where `kind` (plural, singular, short name or kind; `plural.group` where two share it) is served."""
        wanted = kind.lower()
        if wanted not in self._resources:
            # Read again for an unknown name: a CRD may have been installed since.
            self._resources = self._discover()
        if wanted not in self._resources:
            raise LookupError(f"the API server serves no resource {kind!r}: install its CRD first, or mend the name")
        return self._resources[wanted]

    def find(self, kind: str, name: str, *, namespace: str | None = None) -> Object | None:
        """Return the object, or None where there is none."""
        try:
            return self.get(kind, name, namespace=namespace)
        except ApiError as error:
            if error.status == http.HTTPStatus.NOT_FOUND:
                return None
            raise

    def get(self, kind: str, name: str, *, namespace: str | None = None) -> Object:
        """Return the object."""
        found: Object = self.request("GET", self.resource(kind).path(namespace=namespace, name=name))
        return found

    def items(self, kind: str, *, namespace: str | None = None, query: Mapping[str, str] | None = None) -> list[Object]:
        """Return all objects of a kind; `query` holds labelSelector and fieldSelector."""
        path = self.resource(kind).path(namespace=namespace)
        found: list[Object] = self.request("GET", f"{path}?{urlencode(query or {})}")["items"]
        return found

    def create(self, kind: str, body: Object, *, namespace: str | None = None, subresource: str = "") -> Object:
        """Create an object (or post to the subresource of the one that `body` names)."""
        name = body["metadata"]["name"] if subresource else ""
        path = self.resource(kind).path(namespace=namespace, name=name, subresource=subresource)
        created: Object = self.request("POST", path, body=body)
        return created

    def patch(self, kind: str, name: str, body: Any, *, namespace: str | None = None, subresource: str = "") -> Object:
        """Apply a JSON patch (a list) or a merge patch (a mapping)."""
        form = "json-patch" if isinstance(body, list) else "merge-patch"
        path = self.resource(kind).path(namespace=namespace, name=name, subresource=subresource)
        patched: Object = self.request("PATCH", path, body=body, content_type=f"application/{form}+json")
        return patched

    def delete(self, kind: str, name: str, *, namespace: str | None = None, grace_seconds: int | None = None) -> None:
        """Delete the object; harmless where it is gone."""
        options = {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        try:
            self.request("DELETE", self.resource(kind).path(namespace=namespace, name=name), body=options)
        except ApiError as error:
            if error.status != http.HTTPStatus.NOT_FOUND:
                raise

    def close(self) -> None:
        """End the proxy. The next request starts another."""
        if self._proxy is not None:
            self._proxy.stop(grace_seconds=0)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._proxy = self._scratch = None

    def _socket(self) -> Path:
        if self._proxy is None or self._scratch is None or not self._proxy.running:
            self.close()
            # Not in the state folder, whose path may be longer than a socket's name can be.
            self._scratch = scratch = Path(tempfile.mkdtemp(prefix="testkit-api-"))
            options = flags({"kubeconfig": self._kubeconfig, "unix-socket": scratch / "socket"})
            command = [str(self._kubectl), "proxy", *options]
            self._proxy = proxy = ServerProcess(command, log=scratch / "log")

            def listening() -> bool:
                proxy.check()
                return _listens(scratch / "socket")

            wait_until(listening, describe="kubectl proxy to listen", interval=0.02)
        return self._scratch / "socket"

    def _discover(self) -> dict[str, Resource]:
        # The beta has the same shape, and serves where the server is older.
        wanted = "application/json;g=apidiscovery.k8s.io;v={};as=APIGroupDiscoveryList"
        accept = f"{wanted.format('v2')},{wanted.format('v2beta1')}"
        found: dict[str, Resource] = {}
        for root in ("/api", "/apis"):
            for group in self.request("GET", root, accept=accept)["items"]:
                name = group["metadata"].get("name", "")
                # The first version is the preferred one, and the core group comes first: earlier names win.
                for version in group["versions"]:
                    prefix = "/".join(part for part in (root, name, version["version"]) if part)
                    for listed in version["resources"]:
                        _register(found, listed, prefix=prefix, group=name)
        return found


def _listens(path: Path) -> bool:
    """Return whether somebody listens on the socket; its file is there a moment before."""
    connection = _UnixConnection(path)
    try:
        connection.connect()
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    finally:
        connection.close()
    return True


def _register(found: dict[str, Resource], listed: Object, *, prefix: str, group: str) -> None:
    plural = listed["resource"]
    kind = listed.get("responseKind", {}).get("kind", "")
    resource = Resource(prefix=prefix, plural=plural, namespaced=listed["scope"] == "Namespaced")
    aliases = [plural, listed.get("singularResource", ""), kind, *listed.get("shortNames", []), f"{plural}.{group}"]
    for alias in aliases:
        if alias:
            found.setdefault(alias.lower(), resource)


def _error(what: str, *, status: int, text: str) -> ApiError:
    try:
        answer = json.loads(text)
        return ApiError(f"{what}: {answer.get('message', text)}", status=status, reason=answer.get("reason", ""))
    except (json.JSONDecodeError, AttributeError):
        return ApiError(f"{what}: {text.strip()[:500]}", status=status, reason="")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
