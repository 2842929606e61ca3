"""Kill the operator before and after each of its writes during a job's whole life: the life ends the same.

First a life without crashes is recorded; it makes K writes. Then 2 K lives, each with one crash at one of its writes
and a new operator afterwards, must end in the same state, with the same events, and with each pod created exactly once.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from testkit.builders import last_word, make_job
from testkit.kube import Object, condition
from testkit.operating import Installation, Kubelet, OperatorProcess, User, installed
from testkit.waiting import wait_until

pytestmark = pytest.mark.apiserver

KILLED = 137
AT_ONCE = 4
"""Lives that are lived side by side, each in a namespace of its own."""
EVENTS = [
    "AttemptStarted", "AttemptStarted", "Complete", "Preempted", "PreflightPassed", "Running", "Running", "Validated",
]  # fmt: skip
WRITES = ("create", "update", "delete")


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("crashes")) as found:
        yield found


@dataclass(frozen=True)
class Life:
    """What is left of a job's life."""

    final: Object
    """The status without times, and the pods that are kept."""
    events: list[str]
    created: dict[str, int]
    """How often each pod was created, by the API server's own log."""
    writes: int
    """Writes that the API server answered with success."""
    crashed: bool


class Operated:
    """An operator that is started again when it has crashed."""

    def __init__(self, installation: Installation, namespace: str, failpoint: str) -> None:
        self._installation = installation
        self._namespace = namespace
        self.crashed = False
        self.process = OperatorProcess(installation, namespace=namespace, preflight="ON", failpoint=failpoint)

    def look_after(self) -> None:
        """Start a new one in place of one that has crashed."""
        if not self.process.running:
            assert self.process.wait() == KILLED, self.process.tail()
            assert not self.crashed, "only one crash was asked for"
            self.crashed = True
            self.process = OperatorProcess(self._installation, namespace=self._namespace, preflight="ON")


def live(installation: Installation, failpoint: str = "") -> Life:
    """Let a job live: pass the preflight, start, run, be preempted, run again, complete."""
    with installation.kube.namespace("life") as namespace:
        user, kubelet = User(installation.kube, namespace), Kubelet(installation.kube, namespace)
        user.create(make_job())
        operated = Operated(installation, namespace, failpoint)

        def wait(what: str, probe: Any) -> None:
            def look() -> bool:
                operated.look_after()
                return bool(probe())

            wait_until(look, describe=f"{what} ({failpoint})", timeout=60, detail=operated.process.tail)

        def settled(phase: str, reason: str, attempt: int, *events: str) -> bool:
            status = user.job().get("status", {})
            ready = next((c["reason"] for c in status.get("conditions", []) if c["type"] == "PodsReady"), "")
            seen = Counter(user.reasons())
            wanted = all(seen[event] >= events.count(event) for event in events)
            return (status.get("phase"), ready, status.get("attempt")) == (phase, reason, attempt) and wanted

        try:
            wait("the preflight's pod", lambda: settled("Preflight", "", 0, "Validated"))
            kubelet.run("cats-preflight")
            wait("the preflight", lambda: condition(user.job(), "PreflightPassed").get("reason") == "Running")
            kubelet.end("cats-preflight", 0, message=last_word(0, attempt=0))
            wait("the first pod", lambda: settled("Scheduling", "Waiting", 1, "PreflightPassed", "AttemptStarted"))
            # One step at a time, each awaited, so that every life makes the same writes.
            kubelet.bind("cats-1-0")
            wait("the first node", lambda: settled("Preparing", "Waiting", 1))
            kubelet.run("cats-1-0")
            wait("the first run", lambda: settled("Preparing", "Running", 1, "Running"))
            kubelet.end("cats-1-0", 75, message=last_word(75, step=700))
            again = ("Preempted", "AttemptStarted", "AttemptStarted")
            wait("the second pod", lambda: settled("Scheduling", "Waiting", 2, *again))
            kubelet.bind("cats-2-0")
            wait("the second node", lambda: settled("Preparing", "Waiting", 2))
            kubelet.run("cats-2-0")
            wait("the second run", lambda: settled("Preparing", "Running", 2, "Running", "Running"))
            kubelet.end("cats-2-0", 0, message=last_word(0, attempt=2, step=2000))
            wait("the end", lambda: settled("Complete", "AttemptEnded", 2, "Complete"))
            wait(
                "tidying up", lambda: [pod["metadata"]["name"] for pod in pods(installation, namespace)] == ["cats-2-0"]
            )
            if failpoint:  # the last write is seen before the operator has heard its answer, and dies of it
                wait("the crash", lambda: operated.crashed)
        finally:
            if operated.process.running:
                operated.process.stop()
        return remember(installation, namespace, crashed=operated.crashed)


def pods(installation: Installation, namespace: str) -> list[Object]:
    return installation.kube.items("pods", namespace=namespace)


def remember(installation: Installation, namespace: str, *, crashed: bool) -> Life:
    user = User(installation.kube, namespace)
    log = installation.audit(namespace, verbs=WRITES)
    done = [entry for entry in log if entry["responseStatus"]["code"] < 300]
    created = Counter(
        entry["objectRef"]["name"]
        for entry in done
        if (entry["verb"], entry["objectRef"]["resource"]) == ("create", "pods")
    )
    final = {
        "status": timeless(user.job()["status"]),
        "pods": [p["metadata"]["name"] for p in pods(installation, namespace)],
    }
    return Life(final=final, events=user.reasons(), created=created, writes=len(done), crashed=crashed)


def timeless(value: Any) -> Any:
    """Return a status without its times."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.endswith(("At", "Time", "since"))}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_a_crash_at_any_write_changes_nothing(installation: Installation) -> None:
    whole = live(installation)
    assert whole.events == EVENTS
    assert whole.created == {"cats-preflight": 1, "cats-1-0": 1, "cats-2-0": 1}
    assert (whole.final["status"]["phase"], whole.final["status"]["counters"]["failures"]) == ("Complete", 0)
    failpoints = [f"write:{n}:{when}" for n in range(1, whole.writes + 1) for when in ("before", "after")]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        lives = list(threads.map(lambda failpoint: live(installation, failpoint), failpoints))
    for failpoint, life in zip(failpoints, lives, strict=True):
        assert life.crashed, f"{failpoint} was never reached"
        assert life.final == whole.final, failpoint
        assert life.created == whole.created, failpoint
        assert life.events == whole.events, failpoint


def test_a_failpoint_that_skipped_a_write_would_be_seen(installation: Installation) -> None:
    """Negative control: what the test above compares does tell lives apart."""
    with installation.kube.namespace("control") as namespace:
        user, kubelet = User(installation.kube, namespace), Kubelet(installation.kube, namespace)
        user.create(make_job())
        with OperatorProcess(installation, namespace=namespace):
            kubelet.run("cats-1-0")
            user.wait_phase("Preparing")
            kubelet.remove("cats-1-0")
            kubelet.run("cats-2-0")
            user.wait_phase("Preparing", attempt=2)
            kubelet.end("cats-2-0", 0, message=last_word(0, attempt=2, step=2000))
            user.wait_phase("Complete")
        other = remember(installation, namespace, crashed=False)
    assert other.final["status"]["attempts"][1]["message"] != "as the trainer says"
    assert other.created == {"cats-1-0": 1, "cats-2-0": 1}
