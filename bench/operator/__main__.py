"""The operator beside Kubeflow Trainer and JobSet: from create to pod, jobs a second, CPU, memory, writes to the API.

    python -m bench.operator [--bursts 1 100 1000] [--stored 3000] [--only diffusion-operator]

Writes bench/results/operator.json. All three run in one go on one API server with its etcd, the real scheduler and
nodes that kwok plays; each is started for its turn and ended after it, and its objects are deleted. The machine's load
before and after stands in the results: figures of a busy machine compare the three, and mean nothing by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from bench.operator import contenders
from bench.operator.arena import PODS, Arena, arena, clear, create, items, newest, see_pods, usage
from bench.operator.contenders import Contender

from testkit import tools
from testkit.process import ServerProcess

RESULTS = Path(__file__).parents[1] / "results" / "operator.json"
MAKERS = {"diffusion-operator": contenders.ours, "JobSet": contenders.jobset, "Kubeflow Trainer": contenders.trainer}
SINGLES = 20
"""Bursts of one are repeated, one after the other."""
REST_SECONDS = 30
PATIENCE_SECONDS = 1800
Figures = dict[str, Any]


def main() -> int:
    """Measure and write the results; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bursts", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--stored", type=int, default=3000)
    parser.add_argument("--only", choices=MAKERS, action="append")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = os.getloadavg()
    tools.ensure([*tools.CONTROL_PLANE, "kube-scheduler", "kube-controller-manager", "kwok", "trainer", "jobset"])
    figures = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench-operator-") as folder,
        arena(Path(folder), gpus=max(*options.bursts, 200)) as place,
    ):
        for name in options.only or MAKERS:
            contender = MAKERS[name](place.plane, place.folder)
            with contender.start() as processes:
                measured = asyncio.run(measure(place, contender, processes, options.bursts, options.stored))
            figures[f"{name} {contender.version}"] = measured
            print(json.dumps({name: measured}, indent=1), flush=True)
    shutil.rmtree(contenders.CERTIFICATES, ignore_errors=True)
    result = {
        "what": "seconds unless the name says otherwise; each job is one pod with one GPU",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "load average (1, 5, 15 min) before and after": [
            [round(value, 1) for value in load] for load in (before, os.getloadavg())
        ],
        "versions": {
            **{name: tools.TOOLS[name].version for name in ("kube-apiserver", "etcd", "kwok", "trainer", "jobset")},
            **{name: version(name) for name in ("kopf", "kubernetes", "aiohttp")},
            "python": platform.python_version(),
        },
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "figures": figures,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


async def measure(
    place: Arena, contender: Contender, processes: dict[str, ServerProcess], bursts: list[int], stored: int
) -> Figures:
    """Return all figures of one contender."""
    figures: Figures = {"processes": sorted(processes), "idle": {"RSS MiB": round(usage(processes).rss_mib)}}
    async with place.session() as session:
        await clear(session, contender)
        # The first job finds caches cold and connections closed, in every one of them.
        await burst(session, contender, ["warm-up"])
        await clear(session, contender)
        for size in bursts:
            place.writes(contender.users)
            began = usage(processes)
            if size == 1:
                spans = [await burst(session, contender, [f"one-{number}"]) for number in range(SINGLES)]
                latencies, count, wall = [span for one, _ in spans for span in one], SINGLES, None
            else:
                latencies, wall = await burst(session, contender, [f"burst-{size}-{number}" for number in range(size)])
                count = size
            await running(session, count)
            await asyncio.sleep(5)  # what follows a pod's start is written, and the audit log too
            ended = usage(processes)
            figures[f"burst of {size}"] = {
                "create to pod p50": quantile(latencies, 0.5),
                "create to pod p99": quantile(latencies, 0.99),
                **({"pods per second": round(count / wall, 1)} if wall else {"jobs": count}),
                "API writes per job": round(place.writes(contender.users) / count, 2),
                "CPU ms per job": round((ended.cpu_seconds - began.cpu_seconds) * 1000 / count, 1),
            }
            if size == max(bursts):
                figures[f"{size} running"] = await rest(place, contender, processes)
            await clear(session, contender)
        if stored:
            figures[f"{stored} to completion"] = await complete(session, place, contender, processes, stored)
            figures[f"{stored} stored, none running"] = await rest(place, contender, processes)
            await clear(session, contender)
    return figures


async def burst(session: aiohttp.ClientSession, contender: Contender, jobs: list[str]) -> tuple[list[float], float]:
    """Create jobs; return the seconds from each one's create to its pod, and from the first create to the last pod."""
    seen: dict[str, float] = {}
    version_now = await newest(session, PODS)
    async with watching(session, contender, seen, version_now):
        asked = await create(session, contender, jobs, soon=False)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(seen) < len(jobs):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{contender.name}: pods of {len(jobs) - len(seen)} of {len(jobs)} jobs are missing")
            await asyncio.sleep(0.01)
    return [seen[name] - asked[name] for name in jobs], max(seen.values()) - min(asked.values())


@contextlib.asynccontextmanager
async def watching(
    session: aiohttp.ClientSession, contender: Contender, seen: dict[str, float], version_now: str
) -> Any:
    """Note pods for the block."""
    task = asyncio.get_running_loop().create_task(see_pods(session, contender, seen, version=version_now))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def running(session: aiohttp.ClientSession, count: int) -> None:
    """Wait until so many pods run."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while sum(pod["status"].get("phase") == "Running" for pod in await items(session, PODS)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {count} pods run")
        await asyncio.sleep(1)


async def complete(
    session: aiohttp.ClientSession,
    place: Arena,
    contender: Contender,
    processes: dict[str, ServerProcess],
    count: int,
) -> Figures:
    """Let so many jobs, whose pods end after a second, be created and completed as fast as it goes."""
    place.writes(contender.users)
    began = usage(processes)
    await create(session, contender, [f"job-{number}" for number in range(count)], soon=True)
    created = time.monotonic()
    while True:
        done = sum(contender.complete(job) for job in await items(session, contender.path))
        if done >= count:
            break
        if time.monotonic() > created + PATIENCE_SECONDS:
            raise TimeoutError(f"{contender.name}: {done} of {count} jobs completed")
        await asyncio.sleep(1)
    ended = usage(processes)
    await asyncio.sleep(3)  # for the audit log
    return {
        "jobs per second": round(count / (ended.at - began.at), 1),
        "API writes per job": round(place.writes(contender.users) / count, 2),
        "CPU ms per job": round((ended.cpu_seconds - began.cpu_seconds) * 1000 / count, 1),
    }


async def rest(place: Arena, contender: Contender, processes: dict[str, ServerProcess]) -> Figures:
    """Look at it for a while when nothing happens but that pods run."""
    await asyncio.sleep(10)
    place.writes(contender.users)
    began = usage(processes)
    await asyncio.sleep(REST_SECONDS)
    ended = usage(processes)
    await asyncio.sleep(3)  # for the audit log
    seconds = ended.at - began.at
    return {
        "CPU millicores": round(1000 * (ended.cpu_seconds - began.cpu_seconds) / seconds),
        "RSS MiB": round(ended.rss_mib),
        "API writes per second": round(place.writes(contender.users) / (seconds + 3), 2),
    }


def quantile(values: list[float], share: float) -> float:
    """Return the value below which that share of them lies."""
    if len(values) == 1:
        return round(values[0], 3)
    return round(statistics.quantiles(values, n=100, method="inclusive")[int(share * 100) - 1], 3)


if __name__ == "__main__":
    sys.exit(main())
