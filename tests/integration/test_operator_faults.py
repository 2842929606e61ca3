"""Requests that fail in every way, and operators that take over from each other: a job's whole life ends the same.

The faults are made by a proxy between the operator and a real API server. Compared with a life without them are the
final status and pods, the events, and by the API server's own log how often each pod was created.
"""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

from testkit.faults import (
    Asked,
    Cut,
    Drop,
    Exchange,
    Expire,
    Fault,
    FaultProxy,
    Hang,
    Lose,
    Plan,
    Refuse,
    Stale,
    describe,
    every_other,
)
from testkit.lives import EVENTS, Life, live, remember
from testkit.operating import Installation, OperatorProcess, installed
from testkit.waiting import wait_until

pytestmark = pytest.mark.apiserver

AT_ONCE = 10
"""Lives that are lived side by side, each in a namespace of its own."""
CREATED = {"cats-preflight": 1, "cats-1-0": 1, "cats-2-0": 1}
KINDS = 4
"""Jobs, pods, profiles and nodes are read and watched."""
SETTINGS = {"preflight": "ON", "relist_seconds": "1"}
BUSY = Refuse(status=503, retry_after=1)
SLOW_DOWN = Refuse(status=429, retry_after=1)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("faults")) as found:
        yield found


@pytest.fixture(scope="module")
def whole(installation: Installation) -> Life:
    """A life in which nothing goes wrong."""
    found = live_behind(installation, lambda _asked: None)
    life = found.life
    assert (life.events, life.created) == (EVENTS, CREATED)
    assert len(writes(found.exchanges)) == life.writes, "the proxy sees all of it, and nothing is asked for twice"
    return life


def write(asked: Asked) -> bool:
    return asked.write


def read(asked: Asked) -> bool:
    return not asked.write and not asked.watch


def watch(asked: Asked) -> bool:
    return asked.watch


def in_turn(*faults: Fault, of: Callable[[Asked], bool]) -> Plan:
    """Let each of these requests fail once before it succeeds, each time by the next of the faults."""
    turn = iter(range(10**9))
    return lambda asked: faults[next(turn) % len(faults)] if of(asked) and asked.count % 2 else None


def mixed(seed: int) -> Plan:
    """Let a third of all requests fail, each in a way that is drawn anew."""
    draw = random.Random(seed)

    def plan(asked: Asked) -> Fault | None:
        faults: list[Fault] = [Refuse(status=500), BUSY, SLOW_DOWN, Drop(), Refuse(status=401)]
        faults += [Refuse(status=409), Lose()] if asked.write else [Stale()]
        fault = draw.choice([Cut(), Expire(), Drop()] if asked.watch else faults)
        return fault if draw.random() < 1 / 3 else None

    return plan


def hanging(asked: Asked) -> Fault | None:
    """Let the first status, the first pod, one list and one watch hang."""
    status = asked.method == "PUT" and asked.path.endswith("/status")
    pods = asked.path.endswith("/pods") and asked.count == (1 if asked.write else 2)
    return Hang() if (status and asked.count == 1) or pods else None


PLANS: dict[str, Plan] = {
    "writes done without an answer": every_other(Lose(), of=write),
    "writes refused": in_turn(Refuse(status=500), BUSY, Refuse(status=409), Drop(), of=write),
    "reads refused": in_turn(Refuse(status=500), SLOW_DOWN, Drop(), of=read),
    "reads stale": lambda asked: Stale() if read(asked) and asked.count % 2 == 0 else None,
    "watches cut after each event": lambda asked: Cut() if asked.watch else None,
    "watches told that they are too old": every_other(Expire(), of=watch),
    "tokens refused": lambda asked: Refuse(status=401) if asked.count % 3 == 0 else None,
    "a mix": mixed(1),
    "requests that hang": hanging,
}
LONG_PLANS: dict[str, Plan] = {
    **{
        f"{name} {fault}": every_other(fault, of=of)
        for name, of in (("writes", write), ("reads", read), ("watches", watch))
        for fault in (Refuse(status=500), BUSY, SLOW_DOWN, Drop(), Refuse(status=401))
    },
    **{f"mix {seed}": mixed(seed) for seed in range(2, 42)},
}


@dataclass(frozen=True)
class Lived:
    """A life behind the proxy: what was asked of it, and how often the operator was started again."""

    life: Life
    exchanges: list[Exchange]
    seconds: float
    restarts: int = 0

    def requests_at_most(self, writes_without_faults: int) -> dict[str, float]:
        """Return the bounds: what may be asked in so long a life with so many faults."""
        faults = sum(exchange.fault is not None for exchange in self.exchanges)
        again, readings = faults + self.restarts, self.seconds / float(SETTINGS["relist_seconds"]) + 1
        return {
            # A fault may cost two writes more than there were, a restart the events again.
            "writes": writes_without_faults + 2 * faults + len(EVENTS) * self.restarts,
            # Every kind at each complete reading, and what a write that was refused is looked up for.
            "reads": KINDS * (readings + again) + writes_without_faults,
            "watches": KINDS * (2 + again),
        }


def live_behind(installation: Installation, plan: Plan, *, patience_seconds: float = 60, restarts: int = 0) -> Lived:
    """Let a job live with an operator that has only the proxy; it may end and be started again so many times."""
    began = time.monotonic()
    with installation.kube.namespace("life") as namespace:
        with ExitStack() as stack:
            folder = installation.folder / namespace
            proxy = stack.enter_context(FaultProxy(installation.kubeconfig, folder=folder, plan=plan))
            settings = {**SETTINGS, **({"request_seconds": "3"} if plan is hanging else {})}

            def start() -> OperatorProcess:
                behind = replace(installation, kubeconfig=proxy.kubeconfig)
                return stack.enter_context(OperatorProcess(behind, namespace=namespace, **settings))

            operators = [start()]

            def alive() -> None:
                if not operators[-1].running:
                    assert len(operators) <= restarts, operators[-1].tail()
                    operators.append(start())

            def detail() -> str:
                return f"{operators[-1].tail()}\n{describe(proxy.exchanges[-40:])}"

            life = live(installation, namespace, look_after=alive, detail=detail, patience_seconds=patience_seconds)
        return Lived(life, proxy.exchanges, time.monotonic() - began, len(operators) - 1)


def writes(exchanges: list[Exchange]) -> list[Exchange]:
    return [exchange for exchange in exchanges if exchange.asked.write]


def check(
    plans: dict[str, Plan], installation: Installation, whole: Life, *, patience_seconds: float = 60, restarts: int = 0
) -> None:
    """Live by each plan, and compare; what is asked of the API server stays within bounds."""

    def lived(plan: Plan) -> Lived:
        return live_behind(installation, plan, patience_seconds=patience_seconds, restarts=restarts)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        lives = list(threads.map(lived, plans.values()))
    for what, found in zip(plans, lives, strict=True):
        faults = sum(exchange.fault is not None for exchange in found.exchanges)
        assert faults, f"{what}: nothing went wrong"
        assert found.life.final == whole.final, what
        assert found.life.created == whole.created, what
        assert found.life.events == whole.events, what
        asked = {
            "writes": len(writes(found.exchanges)),
            "reads": sum(read(exchange.asked) for exchange in found.exchanges),
            "watches": sum(watch(exchange.asked) for exchange in found.exchanges),
        }
        print(f"{what}: {asked} in {found.seconds:.0f} s with {faults} faults and {found.restarts} restarts")
        bounds = found.requests_at_most(whole.writes)
        assert all(asked[kind] <= bounds[kind] for kind in asked), f"{what}: {bounds}\n{describe(found.exchanges)}"


def test_requests_that_fail_in_every_way_change_nothing(installation: Installation, whole: Life) -> None:
    check(PLANS, installation, whole)


@pytest.mark.nightly
def test_every_fault_everywhere_and_many_mixes_change_nothing(installation: Installation, whole: Life) -> None:
    # Where each third request fails, chance makes a backoff of minutes now and then.
    # When credentials are refused while a watch is read, kopf closes its connections, and aiohttp's RuntimeError ends
    # the operator: its Deployment starts it again.
    check(LONG_PLANS, installation, whole, patience_seconds=900, restarts=5)


class Pair:
    """Two operators that want the same Lease. One that ends is started anew, as a Deployment does."""

    def __init__(self, installation: Installation, namespace: str) -> None:
        self._installation = installation
        self._namespace = namespace
        self._processes: dict[str, OperatorProcess] = {}
        self._started = 0
        self.look_after()

    def look_after(self) -> None:
        """Replace those that have ended."""
        running = {name: process for name, process in self._processes.items() if process.running}
        while len(running) < 2:
            self._started += 1
            name = f"operator-{self._started}"
            running[name] = OperatorProcess(
                self._installation,
                namespace=self._namespace,
                **SETTINGS,
                lease=f"diffusion-operator/{self._namespace}",
                lease_seconds="6",
                identity=name,
            )
        self._processes = running

    def active(self) -> tuple[str, OperatorProcess]:
        """Return the holder of the Lease, and its name."""

        def look() -> tuple[str, OperatorProcess] | None:
            self.look_after()
            lease = self._installation.kube.find("leases", self._namespace, namespace="diffusion-operator") or {}
            holder = lease.get("spec", {}).get("holderIdentity", "")
            process = self._processes.get(holder)
            return (holder, process) if process is not None and process.running else None

        found = wait_until(look, describe="an active operator", detail=self.tail)
        assert found is not None
        return found

    def tail(self) -> str:
        return "\n".join(process.tail() for process in self._processes.values())

    def stop(self) -> None:
        for process in self._processes.values():
            if process.running:
                process.resume()
                process.stop()


def hand_over(installation: Installation, disturb: Callable[[OperatorProcess], object]) -> Life:
    """Let a job live, and disturb the active operator in the middle."""
    with installation.kube.namespace("life") as namespace:
        pair = Pair(installation, namespace)
        disturbed: list[tuple[str, OperatorProcess]] = []

        def at(milestone: str) -> None:
            if milestone == "the first run":
                disturbed.append(pair.active())
                disturb(disturbed[0][1])

        try:
            live(installation, namespace, look_after=pair.look_after, at=at, detail=pair.tail)
            ((name, process),) = disturbed
            assert pair.active()[0] != name
            if process.running:  # it was paused: now it wakes up, and knows nothing of what happened since
                process.resume()
                assert process.wait() == 0
                assert "the lease is lost" in process.log.read_text()
        finally:
            pair.stop()
        return remember(installation, namespace)


DISTURBANCES: dict[str, Callable[[OperatorProcess], object]] = {
    "killed": OperatorProcess.kill,
    "told to stop": OperatorProcess.stop,
    "paused": OperatorProcess.pause,
}


def test_another_operator_takes_over_and_nothing_is_done_twice(installation: Installation, whole: Life) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        lives = list(threads.map(lambda disturb: hand_over(installation, disturb), DISTURBANCES.values()))
    for what, life in zip(DISTURBANCES, lives, strict=True):
        assert life.final == whole.final, what
        assert life.created == whole.created, what
        assert life.events == whole.events, what


@pytest.mark.nightly
def test_two_operators_without_a_lease_would_be_seen(installation: Installation, whole: Life) -> None:
    """Negative control: two that work side by side ask for more than one does, and that shows."""
    with installation.kube.namespace("life") as namespace:
        with FaultProxy(installation.kubeconfig, folder=installation.folder / namespace) as proxy:
            behind = replace(installation, kubeconfig=proxy.kubeconfig)
            with (
                OperatorProcess(behind, namespace=namespace, **SETTINGS),
                OperatorProcess(behind, namespace=namespace, **SETTINGS),
            ):
                life = live(installation, namespace)
        assert len(writes(proxy.exchanges)) > whole.writes
        assert (life.final, life.created) == (whole.final, whole.created), "names and versions guard even then"
