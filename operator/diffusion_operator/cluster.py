"""The Kubernetes API as the operator uses it: plain dictionaries in and out, errors of our own tree.

The only module that knows the client library. Its models are not used: turning every object into one and back costs
more than the request.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from diffusion_api import names
from diffusion_operator import surroundings
from diffusion_operator.cache import Listing
from diffusion_operator.errors import (
    ClusterError,
    ConflictError,
    ExistsError,
    NotFoundError,
    RefusedError,
    SettingsError,
    UnavailableError,
)
from diffusion_operator.settings import Settings
from diffusion_operator.state import Object, Surroundings

logger = logging.getLogger(__name__)

JOBS = f"/apis/{names.API_VERSION}/{names.JOB_PLURAL}"
WORKLOADS = "/apis/kueue.x-k8s.io/v1beta2/workloads"
PROFILES = f"/apis/{names.API_VERSION}/{names.PROFILE_PLURAL}"
POD_SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
PAGE = 500
"""Objects in one page of a list."""
KILLED = 137
CONNECT_SECONDS = 5
LEASES = "/apis/coordination.k8s.io/v1/leases"

Counted = Callable[[str, int], None]
"""(HTTP method, status; 0 without an answer): called after each request."""


class Cluster(Protocol):
    """What the operator asks of Kubernetes."""

    async def list_jobs(self, namespaces: tuple[str, ...]) -> Listing:
        """Return all jobs of the namespaces; of all, without any."""

    async def list_pods(self, namespaces: tuple[str, ...]) -> Listing:
        """Return all pods that the operator manages."""

    async def list_profiles(self) -> Listing:
        """Return all profiles."""

    async def get_job(self, namespace: str, name: str) -> Object:
        """Return the job."""

    async def write_status(self, job: Object, status: Object) -> Object:
        """Replace the job's status; ConflictError where the job is not as it was read."""

    async def delete_job(self, job: Object) -> None:
        """Delete the job and all that belongs to it; ConflictError where it is not as it was read."""

    async def create_pod(self, pod: Object) -> Object:
        """Create the pod; ExistsError where there is one of that name."""

    async def get_pod(self, namespace: str, name: str) -> Object:
        """Return the pod."""

    async def create_service(self, service: Object) -> Object:
        """Create the Service; ExistsError where there is one of that name."""

    async def get_service(self, namespace: str, name: str) -> Object:
        """Return the Service."""

    async def delete_pod(self, pod: Object) -> None:
        """Ask for the deletion of exactly this pod, with the grace that it names."""

    async def patch_pod(self, pod: Object, metadata: Object) -> Object:
        """Merge into the metadata of exactly this pod."""

    async def list_workloads(self, namespace: str) -> tuple[Object, ...] | None:
        """Return Kueue's Workloads; None where there is no Kueue, or not the right to list them."""

    async def delete_workload(self, namespace: str, name: str) -> None:
        """Delete the Workload."""

    async def list_pod_events(self, pod: Object) -> tuple[Object, ...]:
        """Return the events about the pod."""

    async def look_around(self) -> Surroundings:
        """Return nodes, everybody's pods that have one, and events about machines; without what may not be read."""

    async def create_event(self, event: Object) -> None:
        """Create the event; ExistsError where there is one of that name."""


class KubernetesCluster:
    """A cluster behind an API server."""

    def __init__(self, client: ApiClient, *, settings: Settings, counted: Counted | None = None) -> None:
        self._client = client
        self._failpoint = settings.failpoint
        self._timeout = aiohttp.ClientTimeout(total=settings.request_seconds, connect=CONNECT_SECONDS)
        self._writes = 0
        self._counted = counted or (lambda _method, _status: None)
        self._may_write: Callable[[], bool] = lambda: True

    @classmethod
    async def connect(cls, settings: Settings, *, counted: Counted | None = None) -> KubernetesCluster:
        """Return access with the pod's service account or, outside of a cluster, the current kubeconfig.

        Raises:
            SettingsError: there is neither.
        """
        configuration = Configuration()
        try:
            load_incluster_config(client_configuration=configuration)
        except ConfigException:
            try:
                await load_kube_config(settings.kubeconfig, client_configuration=configuration)
            except ConfigException as error:
                raise SettingsError(f"no service account and no kubeconfig: set KUBECONFIG ({error})") from error
        return cls(ApiClient(configuration=configuration), settings=settings, counted=counted)

    def guard(self, may_write: Callable[[], bool]) -> None:
        """Ask before each write from now on, but for those of Leases; UnavailableError where the answer is no."""
        self._may_write = may_write

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def list_jobs(self, namespaces: tuple[str, ...]) -> Listing:
        """Return all jobs, by one list for each namespace."""
        return await self._list_in(namespaces, JOBS)

    async def list_pods(self, namespaces: tuple[str, ...]) -> Listing:
        """Return all pods with our label."""
        return await self._list_in(namespaces, "/api/v1/pods", labelSelector=POD_SELECTOR)

    async def list_profiles(self) -> Listing:
        """Return all profiles."""
        return await self._list_in((), PROFILES)

    async def get_job(self, namespace: str, name: str) -> Object:
        """Return the job as the API server has it now."""
        return await self._request("GET", f"{_within(namespace, JOBS)}/{name}")

    async def write_status(self, job: Object, status: Object) -> Object:
        """Replace the status, guarded by the version that was read."""
        metadata = job["metadata"]
        path = f"{_within(metadata['namespace'], JOBS)}/{metadata['name']}/status"
        # The whole object with the version that was read: the API server refuses it if anything changed since, the
        # user's suspend among it, and ignores all but the status.
        return await self._request("PUT", path, body={**job, "status": status})

    async def delete_job(self, job: Object) -> None:
        """Delete the job if it is still the same one and unchanged; the garbage collector deletes its pods."""
        metadata = job["metadata"]
        path = f"{_within(metadata['namespace'], JOBS)}/{metadata['name']}"
        preconditions = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        await self._request("DELETE", path, body={"preconditions": preconditions, "propagationPolicy": "Background"})

    async def create_pod(self, pod: Object) -> Object:
        """Create the pod."""
        return await self._request("POST", _within(pod["metadata"]["namespace"], "/api/v1/pods"), body=pod)

    async def get_pod(self, namespace: str, name: str) -> Object:
        """Return the pod as the API server has it now."""
        return await self._request("GET", f"{_within(namespace, '/api/v1/pods')}/{name}")

    async def create_service(self, service: Object) -> Object:
        """Create the Service."""
        path = _within(service["metadata"]["namespace"], "/api/v1/services")
        return await self._request("POST", path, body=service)

    async def get_service(self, namespace: str, name: str) -> Object:
        """Return the Service as the API server has it now."""
        return await self._request("GET", f"{_within(namespace, '/api/v1/services')}/{name}")

    async def delete_pod(self, pod: Object) -> None:
        """Delete the pod if it is still the same one."""
        metadata = pod["metadata"]
        path = f"{_within(metadata['namespace'], '/api/v1/pods')}/{metadata['name']}"
        await self._request("DELETE", path, body={"preconditions": {"uid": metadata["uid"]}})

    async def patch_pod(self, pod: Object, metadata: Object) -> Object:
        """Merge into the pod's metadata if it is still the same one."""
        known = pod["metadata"]
        path = f"{_within(known['namespace'], '/api/v1/pods')}/{known['name']}"
        return await self._request("PATCH", path, body={"metadata": {"uid": known["uid"], **metadata}})

    async def list_workloads(self, namespace: str) -> tuple[Object, ...] | None:
        """Return Kueue's Workloads, reduced to what tells why they wait."""
        return await self._readable(_within(namespace, WORKLOADS), surroundings.workload)

    async def delete_workload(self, namespace: str, name: str) -> None:
        """Delete the Workload; Kueue lets go of the pods in its group."""
        await self._request("DELETE", f"{_within(namespace, WORKLOADS)}/{name}")

    async def list_pod_events(self, pod: Object) -> tuple[Object, ...]:
        """Return the events about exactly this pod."""
        metadata = pod["metadata"]
        path = _within(metadata["namespace"], "/api/v1/events")
        found = await self._request("GET", path, query={"fieldSelector": f"involvedObject.uid={metadata['uid']}"})
        return tuple(found["items"])

    async def look_around(self) -> Surroundings:
        """Return what else is in the cluster, reduced to what decides about placing."""
        nodes = await self._readable("/api/v1/nodes", surroundings.node)
        pods = await self._readable("/api/v1/pods", surroundings.placed_pod, fieldSelector=surroundings.PLACED_PODS)
        # Events about objects without a namespace are in `default`.
        path = _within("default", "/api/v1/events")
        events = await self._readable(path, lambda event: event, fieldSelector=surroundings.CLAIM_EVENTS)
        return Surroundings(nodes=nodes, pods=pods, claim_events=events or ())

    async def may_list_nodes(self) -> bool:
        """Return whether the operator has been given the right to."""
        try:
            await self._request("GET", "/api/v1/nodes", query={"limit": "1"})
        except RefusedError:
            return False
        return True

    async def _readable(self, path: str, reduce: Callable[[Object], Object], **query: str) -> tuple[Object, ...] | None:
        """Return the reduced objects; None where the kind is unknown here, or the right to list it was not given."""
        try:
            return (await self._list(path, query, reduce)).items
        except (NotFoundError, RefusedError) as error:
            logger.debug("not looked at: %s", error)
            return None

    async def create_event(self, event: Object) -> None:
        """Create the event."""
        await self._request("POST", _within(event["metadata"]["namespace"], "/api/v1/events"), body=event)

    async def get_lease(self, namespace: str, name: str) -> Object:
        """Return the Lease."""
        return await self._request("GET", f"{_within(namespace, LEASES)}/{name}")

    async def create_lease(self, lease: Object) -> Object:
        """Create the Lease."""
        return await self._request("POST", _within(lease["metadata"]["namespace"], LEASES), body=lease)

    async def replace_lease(self, lease: Object) -> Object:
        """Replace the Lease, guarded by the version that was read."""
        metadata = lease["metadata"]
        path = f"{_within(metadata['namespace'], LEASES)}/{metadata['name']}"
        return await self._request("PUT", path, body=lease)

    async def _list_in(self, namespaces: tuple[str, ...], path: str, **query: str) -> Listing:
        if not namespaces:
            return await self._list(path, query)
        listings = [await self._list(_within(namespace, path), query) for namespace in namespaces]
        items = tuple(item for listing in listings for item in listing.items)
        # The oldest of the versions: what is newer than any of the lists may be missing from it.
        return Listing(items=items, resource_version=min(listing.resource_version for listing in listings))

    async def _list(
        self, path: str, query: dict[str, str], reduce: Callable[[Object], Object] = lambda item: item
    ) -> Listing:
        items: list[Object] = []
        page: dict[str, str] = {}
        while True:
            found = await self._request("GET", path, query={**query, "limit": str(PAGE), **page})
            items += map(reduce, found["items"])
            token = found["metadata"].get("continue")
            if not token:
                version = int(found["metadata"]["resourceVersion"])
                return Listing(items=tuple(items), resource_version=version)
            page = {"continue": token}

    async def _request(
        self, method: str, path: str, *, body: Object | None = None, query: dict[str, str] | None = None
    ) -> Object:
        if method != "GET":
            if not (self._may_write() or path.startswith(LEASES.rpartition("/")[0])):
                raise UnavailableError(f"{method} {path}: another operator may be the active one by now")
            self._fail("before", method)
        content_type = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", "Content-Type": content_type}
        parameters = list((query or {}).items())
        try:
            request = await self._client.param_serialize(
                method,
                path,
                query_params=parameters,
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = await self._client.call_api(*request, _request_timeout=self._timeout)
            content = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._counted(method, 0)
            raise UnavailableError(f"{method} {path}: {type(error).__name__}: {error}") from error
        self._counted(method, answer.status)
        if answer.status >= 400:
            raise _error(f"{method} {path}", answer.status, content, answer.headers.get("Retry-After", ""))
        if method != "GET":
            self._fail("after", method)
        found: Object = json.loads(content)
        return found

    def _fail(self, action: str, method: str) -> None:
        """End the process here if the failpoint says so: the crash that tests need at an exact place."""
        point = self._failpoint
        if point is None or action != point.action or (point.deletions and method != "DELETE"):
            return
        self._writes += 1
        if self._writes == point.write:
            os._exit(KILLED)


def _within(namespace: str, path: str) -> str:
    """Return the path of a kind's collection in one namespace."""
    prefix, _, plural = path.rpartition("/")
    return f"{prefix}/namespaces/{namespace}/{plural}"


def _error(what: str, status: int, content: bytes, retry_after: str) -> ClusterError:
    """Return the error of our own for an answer of the API server."""
    try:
        answer: dict[str, Any] = json.loads(content)
    except ValueError:
        answer = {}
    message = f"{what}: {status}: {answer.get('message') or content[:300].decode(errors='replace')}"
    if status == 404:
        return NotFoundError(message)
    if status == 409:
        return ExistsError(message) if answer.get("reason") == "AlreadyExists" else ConflictError(message)
    if status in {401, 408, 410, 429} or status >= 500:
        # 401: the token is being rotated; 410: a page of a list expired. Both heal by asking again.
        seconds = float(retry_after) if retry_after.isdigit() else 0.0
        return UnavailableError(message, retry_after_seconds=seconds)
    return RefusedError(message)
