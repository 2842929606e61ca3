"""What a running trainer tells the world: the board, and the server of /progress, /metrics and /healthz.

Written by the training thread in microseconds, read by the server's threads without a lock: a slow or hostile reader
never holds training up.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Literal

from diffusion_api import names
from diffusion_api.run import PreflightReport, ProgressReport
from diffusion_api.status import BestCheckpoint, LatestCheckpoint, OutputFile, Progress

Stage = Literal["Preparing", "Running", "Exporting"]
_TEXT_LIMIT, _WARNING_LIMIT = 256, 8
_READ_SECONDS = 5.0
_CLOSE_SECONDS = 0.05  # how long closing may take: the standard library's 0.5 are felt at the end of every process


def timestamp(seconds: float) -> str:
    """Return seconds since 1970 as RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class State:
    """What is on the board. Frozen: a reader holds one state, whatever is written meanwhile."""

    stage: Stage = "Preparing"
    detail: str = ""
    step: int | None = None
    progress: Progress | None = None
    resumed_from_step: int | None = None
    latest_checkpoint: LatestCheckpoint | None = None
    best_checkpoint: BestCheckpoint | None = None
    output: tuple[OutputFile, ...] = ()
    conclusion: str = ""
    stopped_early_at: int | None = None
    warnings: tuple[str, ...] = ()
    preflight: PreflightReport | None = None
    micro_batch_size: int | None = None


class Board:
    """The state of one attempt, and the time of the last sign of life."""

    def __init__(
        self,
        *,
        attempt: int,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.attempt = attempt
        self.state = State()
        self._clock = clock
        self._monotonic = monotonic
        self._writing = threading.Lock()
        self.last_beat = monotonic()

    def update(self, **changes: Any) -> None:
        """Replace fields of the state; this is a sign of life."""
        self.last_beat = self._monotonic()
        with self._writing:
            self.state = replace(self.state, **changes)

    def say(self, detail: str) -> None:
        """Replace what is being done, in words."""
        self.update(detail=detail[:_TEXT_LIMIT])

    def warn(self, text: str) -> None:
        """Add what a user should know, once; of more than eight the newest are kept. No sign of life."""
        with self._writing:
            others = tuple(known for known in self.state.warnings if known != text[:_TEXT_LIMIT])
            kept = (*others, text[:_TEXT_LIMIT])[-_WARNING_LIMIT:]
            self.state = replace(self.state, warnings=kept)

    def now(self) -> str:
        """Return the time as the wire writes it."""
        return timestamp(self._clock())

    def report(self) -> ProgressReport:
        """Return the answer of /progress."""
        state = self.state
        return ProgressReport(
            attempt=self.attempt,
            stage=state.stage,
            detail=state.detail,
            progress=state.progress,
            resumed_from_step=state.resumed_from_step,
            latest_checkpoint=state.latest_checkpoint,
            best_checkpoint=state.best_checkpoint,
            warnings=state.warnings,
            idle_seconds=round(max(0.0, self._monotonic() - self.last_beat), 1),
            time=self.now(),
        )


class ProgressServer(ThreadingHTTPServer):
    """Serves until closed; the port is `server_port`. Use it as a context manager."""

    daemon_threads = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, port: int, *, board: Board, metrics: Callable[[], bytes]) -> None:
        self.board = board
        self.metrics = metrics
        super().__init__(("", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(_CLOSE_SECONDS,), name="progress", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Accept IPv4 on the IPv6 socket too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's, which asks the DNS for the host's name and may wait for seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.server_address[1]

    def server_close(self) -> None:
        """Stop serving and free the port."""
        self.shutdown()
        self._thread.join()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a reader that went away; what it read is nobody's concern."""


class _Handler(BaseHTTPRequestHandler):
    server: ProgressServer
    timeout = _READ_SECONDS

    def do_GET(self) -> None:
        match self.path:
            case names.PROGRESS_PATH:
                body = self.server.board.report().model_dump_json(by_alias=True, exclude_none=True).encode()
                self._answer(body, "application/json")
            case names.METRICS_PATH:
                self._answer(self.server.metrics(), "text/plain; version=0.0.4; charset=utf-8")
            case names.HEALTH_PATH:
                self._answer(b"ok\n", "text/plain")
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Stay quiet: a poll every few seconds is no news."""
