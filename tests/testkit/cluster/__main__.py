"""`python -m testkit.cluster up|down|status|lose NODE|return NODE`: one local cluster, kept for exploring."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from testkit.cluster import record
from testkit.cluster.handle import UnavailableError
from testkit.cluster.local import ClusterError, LocalCluster, take_down
from testkit.cluster.node import NodeError
from testkit.cluster.preflight import MachineUnfitError
from testkit.cluster.sandbox import SandboxError
from testkit.process import ServerError
from testkit.tools import ToolError

_EXPECTED = (ClusterError, MachineUnfitError, NodeError, SandboxError, ServerError, ToolError, UnavailableError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m testkit.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start a cluster that stays until `down`")
    down = commands.add_parser("down", help="end the cluster; harmless when there is none")
    down.add_argument("--force", action="store_true", help="also one that another process, e.g. a test run, holds")
    commands.add_parser("status", help="say whether a cluster is up, and how to use it; exit 1 when none is")
    commands.add_parser("lose", help="let a node die at once").add_argument("node")
    commands.add_parser("return", help="start a lost node again").add_argument("node")
    chosen = parser.parse_args(arguments)
    try:
        return _run(chosen)
    except _EXPECTED as error:
        print(error, file=sys.stderr)
        return 1


def _run(chosen: argparse.Namespace) -> int:
    match chosen.command:
        case "up":
            return _up()
        case "down":
            print("the cluster is down" if take_down(force=chosen.force) else "no cluster was up")
            return 0
        case "status":
            return _status()
        case "lose":
            LocalCluster.attach().lose_node(chosen.node)
            print(f"node {chosen.node} is gone; the cluster notices within seconds")
            return 0
        case _:
            cluster = LocalCluster.attach()
            cluster.return_node(chosen.node)
            cluster.close()
            print(f"node {chosen.node} is back")
            return 0


def _up() -> int:
    found = record.read()
    if found is not None and found.ready and not found.stale:
        print("a cluster is up already")
        return _status()
    began = time.monotonic()
    cluster = LocalCluster(keep=True).start()
    cluster.close()
    print(f"the cluster is up after {time.monotonic() - began:.0f} s")
    return _status()


def _status() -> int:
    found = record.read()
    if found is None:
        print("no cluster is up")
        return 1
    if found.stale:
        print("a killed process left a cluster: clean it up with `python -m testkit.cluster down`")
        return 1
    cluster = LocalCluster.attach()
    print(cluster.kubectl("get", "nodes"), end="")
    owner = f"process {found.owner.pid}, and ends with it" if found.owner else "`up`, and stays until `down`"
    print(f"started by {owner}; logs in {cluster.logs_folder}")
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
