"""Server processes that end with whoever started them, also when that one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# The shell waits for its child, and beside it a reader waits for the end of the pipe that only the starter holds: when
# the starter is gone, however it went, the reader ends the child. Needs neither root nor Linux.
_GUARD = """
exec 3<&0
"$@" 3<&- </dev/null &
child=$!
trap 'kill -TERM $child 2>/dev/null' TERM
{ read -r _ <&3; kill -KILL $child 2>/dev/null; } &
reader=$!
exec 3<&-
wait $child; code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
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
    def pid(self) -> int:
        """The id of the shell that guards it, whose child it is."""
        return self._process.pid

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
        """End it: SIGTERM, then SIGKILL after the grace (at once with 0). Harmless when it has ended."""
        self.resume()
        if grace_seconds and self.running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=grace_seconds)
        if self._process.stdin:
            self._process.stdin.close()  # the guard kills the server now, if it has not ended, and reaps it
        self._process.wait()

    def pause(self) -> None:
        """Stop it in its tracks (SIGSTOP): it neither answers nor closes its connections."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`; harmless otherwise."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)


def flags(options: Mapping[str, object]) -> list[str]:
    """Return options as `--name=value`; true and false are spelt as Go's flags want them."""
    spelt = {name: str(value).lower() if isinstance(value, bool) else value for name, value in options.items()}
    return [f"--{name}={value}" for name, value in spelt.items()]


def free_ports(count: int, *, address: str = "127.0.0.1") -> list[int]:
    """Return ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((address, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def listening(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False
