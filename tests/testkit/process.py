"""Server processes that end with whoever started them, also when that one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from testkit.waiting import wait_until

# The shell waits for its child, and beside it a reader waits for the end of the pipe that only the starter holds: when
# the starter is gone, however it went, the reader ends the child. Needs neither root nor Linux.
_GUARD = """
exec 3<&0
"$@" 3<&- </dev/null &
child=$!
{ read -r _ <&3; kill -KILL $child; } &
reader=$!
exec 3<&-
wait $child; code=$?
kill -KILL $reader 2>/dev/null
exit $code
"""


class ServerError(RuntimeError):
    """A server ended or did not become ready. The message holds the end of its log."""


class ServerProcess:
    """One server, with its log; started at once, ended by `stop` or by the death of this process."""

    def __init__(self, command: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = Path(command[0]).name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "guard", *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise `ServerError` when it has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"{self.name} ended with code {code}; the end of {self.log}:\n{self.tail()}")

    def tail(self, *, lines: int = 15) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, *, grace_seconds: float = 5) -> None:
        """End it: SIGTERM, then SIGKILL after the grace. Harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not self._group_alive(), describe=f"{self.name} to end", timeout=grace_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def _group_alive(self) -> bool:
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def listening(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False
