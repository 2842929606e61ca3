"""One look at a job: what it does when the job is not as it was known, and what it leaves in memory."""

import asyncio
from datetime import datetime

import pytest

from diffusion_operator.errors import ConflictError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.metrics import Metrics
from diffusion_operator.reconcile import Reconciler
from diffusion_operator.settings import Settings
from testkit.builders import NOW, container, last_word, make_job, make_profile, terminated
from testkit.fakes import MemoryCluster, SilentProgress

UID = make_job()["metadata"]["uid"]


class Bench:
    """An operator that is driven by hand."""

    def __init__(self) -> None:
        self.now: datetime = NOW
        self.cluster = MemoryCluster()
        self.cluster.add_profile(make_profile())
        self.cluster.add_job(make_job())
        self.knowledge = Knowledge()
        self.progress = SilentProgress()
        self.metrics = Metrics(version="0", jobs=lambda: self.knowledge.jobs, depth=lambda: 0)
        self.reconciler = Reconciler(
            settings=Settings(trainer_image="t", preflight=False),
            cluster=self.cluster,
            knowledge=self.knowledge,
            progress=self.progress,
            metrics=self.metrics,
            clock=lambda: self.now,
        )
        self.read()

    def read(self) -> list[str]:
        changed: list[str] = []
        asyncio.run(self.knowledge.refresh(self.cluster, (), changed.append))
        return changed

    def look(self) -> float | None:
        return asyncio.run(self.reconciler.reconcile(UID))

    @property
    def phase(self) -> str:
        found: str = self.cluster.jobs["team-a", "cats"]["status"]["phase"]
        return found

    def run_pod(self, name: str = "cats-1-0") -> None:
        spec = {**self.cluster.pods["team-a", name]["spec"], "nodeName": "n1"}
        status = {"phase": "Running", "podIP": "10.0.0.7", **container(running={})}
        self.cluster.set_pod(name, spec=spec, status=status)
        self.read()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_started_job_is_looked_at_again_at_once(bench: Bench) -> None:
    assert bench.look() == 0
    bench.look()
    assert bench.phase == "Scheduling"


def test_after_a_conflict_the_job_is_known_as_it_is(bench: Bench) -> None:
    bench.cluster.change_spec("team-a", "cats", suspend=True)
    with pytest.raises(ConflictError):
        bench.look()
    bench.look()
    assert (bench.phase, bench.cluster.created) == ("Suspended", [])


def test_a_job_that_was_deleted_meanwhile_is_forgotten_without_an_error(bench: Bench) -> None:
    del bench.cluster.jobs["team-a", "cats"]
    assert bench.look() is None
    assert len(bench.knowledge.jobs) == 0


def test_running_trainers_are_followed_and_ended_ones_are_not(bench: Bench) -> None:
    bench.look()
    bench.run_pod()
    bench.look()
    assert bench.progress.followed == {UID: ("10.0.0.7", 1)}
    bench.cluster.set_pod("cats-1-0", status={"phase": "Failed", **terminated(64, message=last_word(64))})
    bench.read()
    bench.look()
    assert (bench.phase, bench.progress.followed) == ("Failed", {})


def test_a_reading_tells_which_jobs_changed(bench: Bench) -> None:
    assert bench.read() == []
    bench.look()
    bench.run_pod()
    bench.cluster.drop_pod("cats-1-0")
    assert bench.read() == [UID]
    bench.cluster.add_profile(make_profile(displayName="new"))
    assert bench.read() == [UID]


def test_nothing_is_kept_of_pods_that_have_been_judged(bench: Bench) -> None:
    bench.look()
    for number in range(1, 5):
        name = f"cats-{number}-0"
        bench.run_pod(name)
        bench.look()
        bench.cluster.drop_pod(name)
        bench.read()
        bench.look()
        bench.look()
    assert [pod.name for pod in bench.knowledge.pods.of_job(UID)] == ["cats-5-0"]
    del bench.cluster.jobs["team-a", "cats"]
    bench.cluster.drop_pod("cats-5-0")
    bench.read()
    bench.look()
    assert (bench.knowledge.pods.of_job(UID), bench.knowledge.told) == ((), {})


def test_attempts_are_counted_by_cause_when_their_end_is_written(bench: Bench) -> None:
    bench.look()
    bench.run_pod()
    bench.look()
    bench.cluster.drop_pod("cats-1-0")
    bench.read()
    bench.look()
    assert 'attempts_ended_total{cause="Preempted"} 1.0' in bench.metrics.text().decode()
