"""Kill the operator before and after each of its writes during a job's whole life: the life ends the same.

First a life without crashes is recorded; it makes K writes. Then 2 K lives, each with one crash at one of its writes
and a new operator afterwards, must end in the same state, with the same events, and with each pod created exactly once.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from testkit.builders import last_word, make_job
from testkit.lives import EVENTS, Life, live, remember
from testkit.operating import Installation, Kubelet, OperatorProcess, User, installed
from testkit.waiting import wait_until

pytestmark = pytest.mark.apiserver

KILLED = 137
AT_ONCE = 4
"""Lives that are lived side by side, each in a namespace of its own."""


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("crashes")) as found:
        yield found


class Operated:
    """An operator that is started again when it has crashed."""

    def __init__(self, installation: Installation, namespace: str, failpoint: str) -> None:
        self._installation = installation
        self._namespace = namespace
        self.crashed = False
        self.process = OperatorProcess(installation, namespace=namespace, preflight="ON", failpoint=failpoint)

    def tail(self) -> str:
        """Return the end of the log of the newest one."""
        return self.process.tail()

    def look_after(self) -> None:
        """Start a new one in place of one that has crashed."""
        if not self.process.running:
            assert self.process.wait() == KILLED, self.process.tail()
            assert not self.crashed, "only one crash was asked for"
            self.crashed = True
            self.process = OperatorProcess(self._installation, namespace=self._namespace, preflight="ON")


def live_with(installation: Installation, failpoint: str = "") -> Life:
    """Let a job live with an operator that dies at the failpoint."""
    with installation.kube.namespace("life") as namespace:
        operated = Operated(installation, namespace, failpoint)

        def crashed() -> bool:
            operated.look_after()
            return operated.crashed

        try:
            live(installation, namespace, look_after=operated.look_after, detail=operated.tail)
            if failpoint:  # the last write is seen before the operator has heard its answer, and dies of it
                wait_until(crashed, describe=f"the crash at {failpoint}", timeout=60, detail=operated.tail)
        finally:
            if operated.process.running:
                operated.process.stop()
        return remember(installation, namespace)


def test_a_crash_at_any_write_changes_nothing(installation: Installation) -> None:
    whole = live_with(installation)
    assert whole.events == EVENTS
    assert whole.created == {"cats-preflight": 1, "cats-1-0": 1, "cats-2-0": 1}
    assert (whole.final["status"]["phase"], whole.final["status"]["counters"]["failures"]) == ("Complete", 0)
    failpoints = [f"write:{n}:{when}" for n in range(1, whole.writes + 1) for when in ("before", "after")]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        lives = list(threads.map(lambda failpoint: live_with(installation, failpoint), failpoints))
    for failpoint, life in zip(failpoints, lives, strict=True):
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
        other = remember(installation, namespace)
    assert other.final["status"]["attempts"][1]["message"] != "as the trainer says"
    assert other.created == {"cats-1-0": 1, "cats-2-0": 1}
