"""Where it is measured: one API server with the real scheduler, the Job controller, and nodes of kwok's."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from bench.operator.contenders import ADMINISTRATORS, NAMESPACE, Contender, descendants

from testkit import tools
from testkit.cluster import NodeSpec
from testkit.controlplane import ControlPlane
from testkit.kube import Object
from testkit.kwok import FakeNodes, Scheduler
from testkit.operating import ROOT
from testkit.process import ServerProcess, flags
from testkit.waiting import wait_until

GPUS_PER_NODE = 8
FIRST_ADDRESS = "127.64.0.1"
ADDRESSES = "127.64.0.1/16"
AT_ONCE = 16
"""Requests that are under way at the same time."""
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
NAMES_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {
            "level": "Metadata",
            "verbs": ["create", "update", "patch", "delete", "deletecollection"],
            "users": ["bench-ours", "bench-jobset", "bench-trainer", "bench-kcm"],
        },
        {"level": "None"},
    ],
}
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What processes have used so far, and use now."""

    at: float
    cpu_seconds: float
    rss_mib: float


class Arena:
    """The API server and what everybody needs beside it."""

    def __init__(self, plane: ControlPlane, audit: Path, folder: Path) -> None:
        self.plane = plane
        self.folder = folder
        self._audit = audit
        self._offset = 0
        self._client = plane.user_kubeconfig("bench-client", groups=ADMINISTRATORS)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Have an administrator's session for the block."""
        content = yaml.safe_load(self._client.read_text())
        cluster, user = content["clusters"][0]["cluster"], content["users"][0]["user"]
        context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as pair:
            for key in ("client-certificate-data", "client-key-data"):
                pair.write(base64.b64decode(user[key]))
            pair.flush()
            context.load_cert_chain(pair.name)
        connector = aiohttp.TCPConnector(ssl=context, limit=AT_ONCE + 2)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(base_url=self.plane.url, connector=connector, timeout=timeout) as session:
            yield session

    def writes(self, users: tuple[str, ...]) -> int:
        """Return how many writes these users made since this was last asked; Leases are not counted."""
        tally: Counter[str] = Counter()
        if self._audit.stat().st_size < self._offset:
            raise RuntimeError(f"{self._audit} was begun anew: writes are lost")
        with self._audit.open("rb") as log:
            log.seek(self._offset)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                entry = json.loads(line)
                if entry.get("objectRef", {}).get("resource") != "leases":
                    tally[entry["user"]["username"]] += 1
        return sum(tally[user] for user in users)


@contextmanager
def arena(folder: Path, *, gpus: int) -> Iterator[Arena]:
    """Start everything for that many pods at a time."""
    audit = folder / "audit.log"
    policy = folder / "policy.yaml"
    policy.write_text(yaml.safe_dump(AUDIT))
    options = {
        "audit-policy-file": policy,
        "audit-log-path": audit,
        "audit-log-maxsize": 100_000,  # MB; beyond 100, by default, it would begin anew, and writes would be lost
        "audit-log-mode": "batch",
        "audit-log-batch-max-wait": "1s",
        # A burst of this size must not lose what is counted.
        "audit-log-batch-throttle-enable": False,
    }
    with ExitStack() as stack:
        plane = stack.enter_context(ControlPlane(options=options))
        kube = plane.kube
        kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        stack.enter_context(Scheduler(kube))
        nodes = stack.enter_context(FakeNodes(kube, pod_addresses=ADDRESSES))
        labels = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
        taints = ["nvidia.com/gpu=present:NoSchedule"]
        count = -(-gpus // GPUS_PER_NODE)
        nodes.add(
            [NodeSpec(f"a100-{n}", gpus=GPUS_PER_NODE, labels=labels, taints=taints) for n in range(count)], timeout=300
        )
        controllers = ServerProcess(_controllers(plane), log=folder / "kube-controller-manager.log")
        stack.callback(controllers.stop)
        trainers = ServerProcess(
            [sys.executable, "-m", "bench.operator.trainers", FIRST_ADDRESS, str(gpus * 2)],
            log=folder / "trainers.log",
            env={"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )
        stack.callback(trainers.stop)
        wait_until(lambda: "listening" in trainers.log.read_text(), describe="trainers", detail=trainers.tail)
        yield Arena(plane, audit, folder)


def _controllers(plane: ControlPlane) -> list[str | Path]:
    kubeconfig = plane.user_kubeconfig("bench-kcm", groups=ADMINISTRATORS)
    options: dict[str, object] = {
        "kubeconfig": kubeconfig,
        "authentication-kubeconfig": kubeconfig,
        "authorization-kubeconfig": kubeconfig,
        "controllers": "job-controller",
        "leader-elect": False,
        "secure-port": 0,
        # The peers that build on it are not to be held back by it: its defaults are 20 and 30.
        "kube-api-qps": 1000,
        "kube-api-burst": 1000,
        "concurrent-job-syncs": 16,
    }
    return [tools.binary("kube-controller-manager"), *flags(options)]


async def create(
    session: aiohttp.ClientSession, contender: Contender, jobs: list[str], *, soon: bool
) -> dict[str, float]:
    """Create jobs as fast as the API server takes them; return when each was asked for."""
    asked: dict[str, float] = {}
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> None:
        async with gate:
            asked[name] = time.monotonic()
            async with session.post(contender.path, json=contender.job(name, soon)) as answer:
                if answer.status >= 400:
                    raise RuntimeError(f"{contender.name}: {await answer.text()}")

    await asyncio.gather(*(one(name) for name in jobs))
    return asked


async def see_pods(
    session: aiohttp.ClientSession, contender: Contender, seen: dict[str, float], *, version: str
) -> None:
    """Note when the first pod of each job appears, for as long as this runs."""
    query = {"watch": "true", "resourceVersion": version}
    async with session.get(PODS, params=query, headers={"Accept": NAMES_ONLY}) as answer:
        buffer = b""
        async for chunk in answer.content.iter_any():
            now = time.monotonic()
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["type"] == "ADDED":
                    job = (event["object"]["metadata"].get("labels") or {}).get(contender.pod_label)
                    if job:
                        seen.setdefault(job, now)


async def items(session: aiohttp.ClientSession, path: str) -> list[Object]:
    """Return all objects of a collection."""
    async with session.get(path) as answer:
        answer.raise_for_status()
        found: dict[str, Any] = await answer.json()
        return list(found["items"])


async def newest(session: aiohttp.ClientSession, path: str) -> str:
    """Return the version of a collection as it is now."""
    async with session.get(path, params={"limit": "1"}) as answer:
        return str((await answer.json())["metadata"]["resourceVersion"])


async def clear(session: aiohttp.ClientSession, contender: Contender) -> None:
    """Delete all jobs with everything that belongs to them."""
    paths = [contender.path, *contender.leftovers, PODS]
    while True:
        left = 0
        for path in paths:
            options = {"gracePeriodSeconds": 0, "propagationPolicy": "Background"}
            async with session.delete(path, json=options) as answer:
                answer.raise_for_status()
        for path in paths:
            async with session.get(path, params={"limit": "1"}) as answer:
                left += len((await answer.json())["items"])
        if not left:
            return
        await asyncio.sleep(0.5)


def usage(processes: dict[str, ServerProcess]) -> Usage:
    """Return what these servers have used."""
    ticks, resident = 0, 0.0
    for process in processes.values():
        for pid in descendants(process):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    resident += int(line.split()[1]) / 1024
    return Usage(time.monotonic(), ticks / _TICKS, resident)
