"""An API server's bad days: a proxy before a real one that refuses, hangs, drops, loses answers and serves what is old.

Who is to suffer gets the proxy's kubeconfig; everybody else keeps talking to the API server itself.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml
from aiohttp import web

_HOP = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding", "content-encoding"}
"""Headers that are between two neighbours, or that speak of an encoding that is undone here."""

_TURNS = 10
"""Of the event loop at the end, in which connections that were broken off are closed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, as far as faults are chosen by it."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    count: int = 1
    """How often exactly this was asked for, this time included."""

    @property
    def watch(self) -> bool:
        """Whether it asks for a stream of changes."""
        return self.query.get("watch", "").lower() == "true"

    @property
    def write(self) -> bool:
        """Whether it changes something."""
        return self.method != "GET"


@dataclass(frozen=True, kw_only=True)
class Refuse:
    """Answer with an error and do nothing."""

    status: int
    reason: str = ""
    retry_after: int | None = None


@dataclass(frozen=True)
class Drop:
    """Close the connection instead of doing anything."""


@dataclass(frozen=True)
class Lose:
    """Do it, and close the connection instead of answering."""


@dataclass(frozen=True)
class Hang:
    """Do nothing and say nothing until the client has had enough."""


@dataclass(frozen=True)
class Cut:
    """Let so many events of a watch pass, then close the connection in the middle of the next line."""

    events: int = 1


@dataclass(frozen=True)
class Expire:
    """Tell a watch that its version is too old: 410 within a stream that began well."""


@dataclass(frozen=True)
class Stale:
    """Answer with what was answered to the same request before; honestly where it is the first."""


Fault = Refuse | Drop | Lose | Hang | Cut | Expire | Stale
Plan = Callable[[Asked], Fault | None]
"""What goes wrong with a request; None where nothing does."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What became of one request."""

    asked: Asked
    fault: Fault | None
    status: int
    """Of the API server's answer; 0 where it was not asked."""


class FaultProxy:
    """The proxy, for as long as the `with` block. `exchanges` holds everything that ended, in that order."""

    def __init__(self, kubeconfig: Path, *, folder: Path, plan: Plan = lambda _asked: None) -> None:
        """`kubeconfig` says where the API server is and whose token is used; the client's goes to `folder`."""
        self._content = yaml.safe_load(kubeconfig.read_text())
        (cluster,) = self._content["clusters"]
        self._upstream = str(cluster["cluster"]["server"])
        self._trust = ssl.create_default_context(
            cadata=base64.b64decode(cluster["cluster"].pop("certificate-authority-data")).decode()
        )
        self._folder = folder
        self.plan = plan
        self.exchanges: list[Exchange] = []
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._answers: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self._fetches: set[asyncio.Task[tuple[int, bytes, dict[str, str]]]] = set()
        self.kubeconfig = folder / "faulty.conf"

    @property
    def writes(self) -> list[Exchange]:
        """Everything that the client tried to change, with whatever result."""
        return [exchange for exchange in self.exchanges if exchange.asked.write]

    def __enter__(self) -> Self:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        self._content["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{port}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.kubeconfig.write_text(yaml.safe_dump(self._content))
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        # Nothing is timed out here: that is the client's affair.
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._trust, limit=0), timeout=timeout)
        app = web.Application(client_max_size=16 * 1024**2)
        app.router.add_route("*", "/{path:.*}", self._answer)
        # A client that gives up ends what is done for it; and nothing is worth waiting for at the end.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port: int = self._runner.addresses[0][1]
        return port

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        await asyncio.gather(*self._fetches, return_exceptions=True)
        if self._session is not None and self._session.connector is not None:
            await self._session.connector.close(abort_ssl=True)
            await self._session.close()
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        asked = self._count(request)
        fault = self.plan(asked)
        status = 0
        try:
            match fault:
                case Refuse():
                    return _refusal(fault)
                case Drop():
                    return _hang_up(request)
                case Hang():
                    await asyncio.Event().wait()
                case Expire():
                    return web.json_response(_event_of_410())
                case _:
                    response, status = await self._forward(request, asked, fault)
                    return response
        finally:
            self.exchanges.append(Exchange(asked=asked, fault=fault, status=status))
        raise AssertionError("no answer is reached here")

    def _count(self, request: web.Request) -> Asked:
        query = dict(request.query)
        # Versions differ from one watch to the next, and it is the same question all the same.
        same = "&".join(f"{key}={value}" for key, value in sorted(query.items()) if key != "resourceVersion")
        key = (request.method, request.path, same)
        self._counts[key] += 1
        return Asked(method=request.method, path=request.path, query=query, count=self._counts[key])

    async def _forward(self, request: web.Request, asked: Asked, fault: Fault | None) -> tuple[web.StreamResponse, int]:
        if asked.watch:
            async with self._ask(request, b"") as upstream:
                cut = fault.events if isinstance(fault, Cut) else None
                return await _stream(request, upstream, cut=cut), upstream.status
        # What was begun is ended, also when the client leaves: so does the API server.
        fetch = self._loop.create_task(self._fetch(request, await request.read()))
        self._fetches.add(fetch)
        fetch.add_done_callback(self._fetches.discard)
        status, content, headers = await asyncio.shield(fetch)
        if isinstance(fault, Lose):
            return _hang_up(request), status
        told, content = self._remember(request, status, content, stale=isinstance(fault, Stale))
        return web.Response(status=told, body=content, headers=headers), status

    async def _fetch(self, request: web.Request, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        async with self._ask(request, body) as upstream:
            return upstream.status, await upstream.read(), _passed_on(upstream.headers)

    def _ask(self, request: web.Request, body: bytes) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._session is None:
            raise RuntimeError("the proxy is not running: use it in a `with` block")
        url = self._upstream + request.path_qs
        return self._session.request(request.method, url, data=body or None, headers=_passed_on(request.headers))

    def _remember(self, request: web.Request, status: int, content: bytes, *, stale: bool) -> tuple[int, bytes]:
        key = (request.method, request.path_qs)
        if stale and key in self._answers:
            return self._answers[key]
        if request.method == "GET" and status == web.HTTPOk.status_code:
            self._answers[key] = (status, content)
        return status, content


async def _stream(request: web.Request, upstream: aiohttp.ClientResponse, *, cut: int | None) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, headers=_passed_on(upstream.headers))
    await response.prepare(request)
    seen = 0
    connection = upstream.connection
    try:
        async for line in upstream.content:
            seen += 1
            if cut is not None and seen > cut:
                await response.write(line[: len(line) // 2])
                return _hang_up(request)
            await response.write(line)
        await response.write_eof()
    except ConnectionResetError:
        pass  # the client has left
    finally:
        # Nothing but breaking it off ends a stream; saying goodbye would take longer than the proxy may live.
        if connection is not None and connection.transport is not None:
            connection.transport.abort()
    return response


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP}


def _hang_up(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()  # to nobody


def _refusal(fault: Refuse) -> web.Response:
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    reason = fault.reason or {401: "Unauthorized", 409: "Conflict", 429: "TooManyRequests"}.get(fault.status, "")
    body = _status(fault.status, reason or "InternalError", message="planned by a test")
    return web.json_response(body, status=fault.status, headers=headers)


def _event_of_410() -> dict[str, Any]:
    return {"type": "ERROR", "object": _status(410, "Expired", message="too old resource version: planned by a test")}


def _status(code: int, reason: str, *, message: str) -> dict[str, Any]:
    return {
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message,
    }  # fmt: skip


def every_other(fault: Fault, *, of: Callable[[Asked], bool]) -> Plan:
    """Return a plan by which of these requests each that is asked anew fails, and succeeds when it is asked again."""
    return lambda asked: fault if of(asked) and asked.count % 2 else None


def describe(exchanges: list[Exchange]) -> str:
    """Return the exchanges for people, one a line."""
    return "\n".join(
        json.dumps([e.asked.method, e.asked.path, e.asked.count, str(e.fault), e.status]) for e in exchanges
    )
