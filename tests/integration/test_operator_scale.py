"""Thousands of jobs: at rest nothing is written, however often everything is read again, and memory stays bounded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from testkit.builders import last_word, make_job
from testkit.faults import Exchange, FaultProxy, describe
from testkit.kube import Kube
from testkit.operating import JOBS, Installation, Kubelet, OperatorProcess, User, installed
from testkit.waiting import wait_until

pytestmark = [pytest.mark.apiserver, pytest.mark.nightly, pytest.mark.timeout(3600)]

STORED, WAITING = 2000, 1000
LIMIT_MIB = 512
"""Of the operator's container, in examples/install/operator.yaml."""
QUIET_RELISTS = 3
SLOW = 1800


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("scale")) as found:
        yield found


def store(kube: Kube, namespace: str, *, like: dict[str, object]) -> None:
    """Create jobs that have been completed, and others that nobody has looked at."""

    def one(number: int) -> None:
        name = f"job-{number}"
        kube.api.create(JOBS, {**make_job(), "metadata": {"name": name}}, namespace=namespace)
        if number < STORED:
            kube.api.patch(JOBS, name, {"status": like}, namespace=namespace, subresource="status")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(STORED + WAITING)))


def relists(proxy: FaultProxy) -> int:
    """Return how often all jobs were read, by the first pages."""
    lists = [e.asked for e in proxy.exchanges if e.asked.path.endswith(JOBS) and not e.asked.watch]
    return sum("continue" not in asked.query for asked in lists)


def writes_at_rest(proxy: FaultProxy, operator: OperatorProcess) -> list[Exchange]:
    """Wait until a few complete readings in a row led to no write; return what was written until then."""
    state = (-1, 0)

    def quiet() -> bool:
        nonlocal state
        assert operator.running, operator.tail()
        written = len(proxy.writes)
        if written != state[0]:
            state = (written, relists(proxy))
        return relists(proxy) >= state[1] + QUIET_RELISTS

    wait_until(quiet, describe="rest", timeout=SLOW, detail=lambda: describe(proxy.writes[-20:]))
    return proxy.writes


def resident_mib(operator: OperatorProcess) -> float:
    lines = Path(f"/proc/{operator.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def test_thousands_of_jobs_at_rest(installation: Installation) -> None:
    with installation.kube.namespace("scale") as namespace:
        user, kubelet = User(installation.kube, namespace), Kubelet(installation.kube, namespace)
        user.create(make_job())
        with OperatorProcess(installation, namespace=namespace):
            kubelet.run("cats-1-0")
            kubelet.end("cats-1-0", 0, message=last_word(0, step=2000))
            finished = user.wait_phase("Complete")
        store(installation.kube, namespace, like=finished)
        for _ in range(2):  # the second time everything is there already
            with FaultProxy(installation.kubeconfig, folder=installation.folder) as proxy:
                behind = replace(installation, kubeconfig=proxy.kubeconfig)
                settings = {"relist_seconds": "5", "log_level": "INFO"}
                with OperatorProcess(behind, namespace=namespace, **settings) as operator:
                    written = writes_at_rest(proxy, operator)
                    memory = resident_mib(operator)
            pods = [e for e in written if e.asked.method == "POST" and e.asked.path.endswith("/pods")]
            statuses = [e for e in written if e.asked.method == "PUT"]
            print(f"{len(written)} writes, {len(pods)} pods, {len(statuses)} statuses, {memory:.0f} MiB at most")
            assert memory < LIMIT_MIB
            assert {e.status for e in pods} <= {201}
        assert (pods, statuses) == ([], []), "started again, it finds everything done"
        found = installation.kube.items("pods", namespace=namespace)
        assert len({pod["metadata"]["name"] for pod in found}) == len(found) == WAITING + 1
