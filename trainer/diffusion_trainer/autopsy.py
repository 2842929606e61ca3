"""The log of an attempt that failed, put into the bucket: status and termination message keep only its end.

Best effort, bounded in size and in time, and never in the way of the failure itself: whatever goes wrong here is a line
in the log.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path

from diffusion_api import names
from diffusion_api.run import RunConfig
from diffusion_trainer.objectstore import Credentials, join_uri, open_store
from diffusion_trainer.objectstore.settings import TransferSettings

LOG = logging.getLogger("diffusion_trainer")
MAX_BYTES = 256 * 1024
PATIENCE_SECONDS = 15.0
_TRANSFER = TransferSettings(retries=2, connect_timeout_seconds=3.0, read_timeout_seconds=5.0)


class Recorder(logging.Handler):
    """Keeps the end of the log, at most `max_bytes` of it, in whole lines."""

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        super().__init__()
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._max_bytes = max_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, and let go of what is too old."""
        for line in self.format(record).splitlines():
            entry = line.encode(errors="replace")[: self._max_bytes - 1] + b"\n"
            self._lines.append(entry)
            self._bytes += len(entry)
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._lines.popleft())

    def content(self) -> bytes:
        """Return what is kept."""
        return b"".join(self._lines)


def keep_log(
    run: RunConfig, content: bytes, *, rank: int, credentials: Path, patience_seconds: float = PATIENCE_SECONDS
) -> str | None:
    """Put the log of one process of a failed attempt into the bucket.

    Return the URI of the folder with the attempt's logs, None where this one could not be put there in time.
    """
    done: list[str] = []
    # A thread, because a client of a store that hangs cannot be told to stop; the process ends without it.
    thread = threading.Thread(target=_put, args=(run, content, rank, credentials, done), name="autopsy", daemon=True)
    thread.start()
    thread.join(patience_seconds)
    if thread.is_alive():
        LOG.warning("the log could not be put into the bucket within %.0f s", patience_seconds)
    return done[0] if done else None


def _put(run: RunConfig, content: bytes, rank: int, credentials: Path, done: list[str]) -> None:
    spec = run.spec
    folder = names.attempt_logs(run.job.uid, run.attempt)
    try:
        store = open_store(
            spec.output.destination,
            credentials=Credentials.from_folder(credentials) if spec.credentials.secret_ref else None,
            endpoint_url=spec.credentials.endpoint_url,
            settings=_TRANSFER,
        )
        store.put(f"{folder}rank-{rank}.log", content)
    except Exception as error:  # noqa: BLE001 - the attempt has failed already; that must be what is heard of
        LOG.warning("the log could not be put into the bucket: %s", error)
        return
    done.append(join_uri(spec.output.destination, folder))
