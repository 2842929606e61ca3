"""Run the commands of a guide on a local cluster and put what they print into the guide.

    python -m testkit.transcript docs/guides/first-job.md

In the guide, a fenced block of kind `console` holds lines `$ command` and, below each, its output, which is replaced.
So a guide shows what a reader will see, and nobody copies it by hand.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from testkit import installation
from testkit.cluster import LocalCluster
from testkit.demo import NAMESPACE, prepare_team
from testkit.s3 import S3Server

BLOCK = re.compile(r"(?P<open>```console\n)(?P<body>.*?)(?P<close>```)", re.DOTALL)
MAX_LINES = 40


def rewrite(guide: str, run: Callable[[str], str]) -> str:
    """Return the guide with the output of every command replaced by what `run(command)` returns."""

    def block(found: re.Match[str]) -> str:
        commands = [line[2:] for line in found["body"].splitlines() if line.startswith("$ ")]
        shown = "".join(f"$ {command}\n{_shortened(run(command))}" for command in commands)
        return f"{found['open']}{shown}{found['close']}"

    return BLOCK.sub(block, guide)


def _shortened(output: str) -> str:
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"... ({len(lines) - MAX_LINES + 1} more lines)"]
    return "".join(f"{line}\n" for line in lines)


def main(arguments: list[str]) -> int:
    """Rewrite the guides named; return the exit code."""
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="transcript-")))
        cluster = stack.enter_context(LocalCluster())
        s3 = stack.enter_context(S3Server(address=cluster.host_ip, buckets=installation.BUCKETS))
        installation.stock(s3, work)
        installation.install(cluster)
        prepare_team(cluster, s3)
        cluster.kubectl("config", "set-context", "--current", "--namespace", NAMESPACE)
        path = f"{cluster.kubectl_path.parent}:/usr/bin:/bin"
        tools = {"PATH": path, "KUBECONFIG": str(cluster.kubeconfig), "HOME": str(work)}

        def run(command: str) -> str:
            print(f"$ {command}", flush=True)
            done = subprocess.run(
                ["/bin/bash", "-c", command],
                cwd=installation.ROOT,
                env=tools,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=900,
                check=False,
            )
            return done.stdout

        for name in arguments:
            guide = Path(name)
            guide.write_text(rewrite(guide.read_text(), run))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
