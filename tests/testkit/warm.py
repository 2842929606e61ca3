"""Trainers as processes of their own, forked from one that has torch and diffusers imported already.

Importing them costs about ten seconds of CPU, which a test that starts dozens of trainers cannot pay each time. A fork
of a process that did nothing but import is fresh in every way that matters here: no generator, model or optimizer of an
earlier run is in it, and the generators that a new interpreter would seed from the system are seeded so again.
(What an interpreter draws once, the seed of string hashes, is shared; one test starts real interpreters for that.)

    {"environ": {...}, "log": path, "seams": [["name", argument], ...]}    one line on standard input
    {"pid": 123}                                                           the answer: it runs
    {"pid": 123, "code": -9}                                               it ended; negative: by this signal
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Seam = tuple[str, Any]


class WarmTrainers:
    """Starts trainers, one at a time. Use it as a context manager."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "testkit.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )

    def start(self, environ: Mapping[str, str], *, log: Path, seams: Sequence[Seam] = ()) -> int:
        """Start a trainer and return its process id, which is that of its process group, too."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"environ": dict(environ), "log": str(log), "seams": list(seams)}) + "\n")
        self._server.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> int:
        """Return the exit code of the trainer, or minus the signal that killed it."""
        return int(self._answer()["code"])

    def _answer(self) -> dict[str, int]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that forks trainers ended with code {self._server.wait()}")
        answer: dict[str, int] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


def serve() -> None:
    """Fork a trainer per line of standard input."""
    import diffusers.models.autoencoders.autoencoder_kl
    import diffusers.models.unets.unet_2d_condition
    import peft
    import transformers

    import diffusion_trainer.train

    _ = (diffusers, peft, transformers, diffusion_trainer.train)  # it is all about having them imported
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become_trainer(order)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:  # a pod dies as a whole: the uploader and the loader's workers go with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        print(json.dumps({"pid": pid, "code": code}), flush=True)


def _become_trainer(order: dict[str, Any]) -> None:
    """Be `python -m diffusion_trainer`, and never come back."""
    os.setsid()
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(order["environ"])
    sys.argv = ["diffusion_trainer"]
    code = 1
    try:
        from diffusion_trainer.__main__ import main
        from testkit import seams

        seams.seed_like_a_new_interpreter()
        for name, argument in order["seams"]:
            getattr(seams, name)(argument)
        code = main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - the end of a process, and it is shown
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()  # os._exit below skips them, and returning would run the server's
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
