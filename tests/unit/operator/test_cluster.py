"""The API client at its edge: what an answer means, and what is sent. A server on this machine plays the API server."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from diffusion_operator.cluster import KubernetesCluster
from diffusion_operator.errors import (
    ClusterError,
    ConflictError,
    ExistsError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from diffusion_operator.settings import Settings
from testkit.builders import make_job, make_pod

Answer = Callable[[web.Request], Awaitable[web.Response]]


@asynccontextmanager
async def api_server(answer: Answer) -> AsyncIterator[tuple[KubernetesCluster, list[tuple[str, int]]]]:
    """Yield a cluster behind a server that answers so, and what it counts."""
    app = web.Application()

    async def handle(request: web.Request) -> web.Response:
        return await answer(request)

    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    counted: list[tuple[str, int]] = []
    cluster = KubernetesCluster(
        ApiClient(configuration=configuration),
        settings=Settings(trainer_image="trainer"),
        counted=lambda method, status: counted.append((method, status)),
    )
    try:
        yield cluster, counted
    finally:
        await cluster.close()
        await runner.cleanup()


def status(code: int, reason: str = "", **headers: str) -> Answer:
    async def answer(_request: web.Request) -> web.Response:
        body = {"kind": "Status", "reason": reason, "message": f"says {code}"}
        return web.json_response(body, status=code, headers=headers)

    return answer


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (401, "Unauthorized", UnavailableError),
        (403, "Forbidden", RefusedError),
        (404, "NotFound", NotFoundError),
        (409, "AlreadyExists", ExistsError),
        (409, "Conflict", ConflictError),
        (410, "Expired", UnavailableError),
        (422, "Invalid", RefusedError),
        (429, "TooManyRequests", UnavailableError),
        (500, "InternalError", UnavailableError),
        (503, "ServiceUnavailable", UnavailableError),
    ],
)
async def test_each_answer_is_an_error_of_our_own(code: int, reason: str, error: type[ClusterError]) -> None:
    async with api_server(status(code, reason)) as (cluster, counted):
        with pytest.raises(error, match=f"says {code}") as caught:
            await cluster.get_job("team-a", "cats")
    assert type(caught.value) is error
    assert counted == [("GET", code)]


async def test_the_server_says_when_to_come_back() -> None:
    async with api_server(status(429, **{"Retry-After": "7"})) as (cluster, _):
        with pytest.raises(UnavailableError) as caught:
            await cluster.list_profiles()
    assert caught.value.retry_after_seconds == 7


async def test_an_answer_that_is_no_json_is_shown() -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="upstream connect error", status=502)

    async with api_server(answer) as (cluster, _):
        with pytest.raises(UnavailableError, match="upstream connect error"):
            await cluster.list_profiles()


async def test_no_server_at_all() -> None:
    async with api_server(status(200)) as (cluster, counted):
        cluster._client.configuration.host = "http://127.0.0.1:1"
        with pytest.raises(UnavailableError, match="/api/v1/namespaces/team-a/pods/x"):
            await cluster.get_pod("team-a", "x")
    assert counted == [("GET", 0)]


class Recorder:
    """Answers everything with success and remembers it."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self._answers = list(answers)

    async def __call__(self, request: web.Request) -> web.Response:
        text = await request.text()
        self.asked.append((request.method, request.path_qs, json.loads(text) if text else None))
        return web.json_response(self._answers.pop(0) if self._answers else {})


async def test_a_status_is_written_with_the_version_that_was_read() -> None:
    recorder = Recorder()
    async with api_server(recorder) as (cluster, _):
        await cluster.write_status(make_job(), {"phase": "Running"})
    ((method, path, body),) = recorder.asked
    assert (method, path.rsplit("/", 2)[1:]) == ("PUT", ["cats", "status"])
    assert (body["metadata"]["resourceVersion"], body["status"]) == ("1", {"phase": "Running"})


async def test_exactly_the_known_pod_is_deleted_with_its_own_grace() -> None:
    recorder = Recorder()
    async with api_server(recorder) as (cluster, _):
        await cluster.delete_pod(make_pod(make_job()))
    ((method, path, body),) = recorder.asked
    assert (method, path) == ("DELETE", "/api/v1/namespaces/team-a/pods/cats-1-0")
    assert body == {"preconditions": {"uid": "0d9c3a52-pod-1-0"}}


async def test_a_job_is_deleted_as_it_was_read_and_its_pods_in_the_background() -> None:
    recorder = Recorder()
    async with api_server(recorder) as (cluster, _):
        await cluster.delete_job(make_job())
    ((method, path, body),) = recorder.asked
    assert (method, path.split("/")[-3:]) == ("DELETE", ["team-a", "diffusiontrainingjobs", "cats"])
    assert body["preconditions"] == {"uid": make_job()["metadata"]["uid"], "resourceVersion": "1"}
    assert body["propagationPolicy"] == "Background"


async def test_long_lists_come_in_pages_and_short_ones_of_each_namespace() -> None:
    first = {"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [{"n": 1}]}
    rest = {"metadata": {"resourceVersion": "9"}, "items": [{"n": 2}]}
    other = {"metadata": {"resourceVersion": "8"}, "items": [{"n": 3}]}
    recorder = Recorder(first, rest, other)
    async with api_server(recorder) as (cluster, _):
        listing = await cluster.list_pods(("a", "b"))
    assert ([item["n"] for item in listing.items], listing.resource_version) == ([1, 2, 3], 8)
    paths = [path for _, path, _ in recorder.asked]
    assert ["continue=more" in path for path in paths] == [False, True, False]
    assert all("labelSelector=app.kubernetes.io" in path for path in paths)
