"""What a job cost, against the truth of invented histories that the operator sees through its usual keyhole.

The truth is added up by the history itself, from what it lets happen; nothing of it comes from the operator.
"""

import random
from dataclasses import dataclass

import pytest

from diffusion_api.run import ProgressReport
from diffusion_operator.state import Heard
from testkit.builders import (
    at,
    last_word,
    make_checkpoint,
    make_job,
    make_pod,
    make_profile,
    make_progress,
    make_report,
)
from testkit.deciding import after, ask, started
from testkit.simulation import Simulation

STEP_SECONDS = 2.0
BATCH = 16
PREPARATION_SECONDS = 90
SAVE_STEPS = 100
POLL_SECONDS = 60


@dataclass
class Truth:
    """What really happened."""

    gpu_seconds: float = 0
    lost: float = 0
    useful: float = 0


class History:
    """A job of 20,000 steps on spot nodes, with an operator that is restarted, and away, now and then."""

    total = 20_000

    def __init__(self, *, seed: int, gpus: int) -> None:
        self.random = random.Random(seed)
        self.gpus = gpus
        price = {"currency": "USD", "onDemand": 3.6}
        job = make_job(
            resources={"gpusPerNode": gpus}, training={"batchSize": BATCH, "maxSteps": self.total}, runPolicy={}
        )
        self.world = Simulation(job, profile=make_profile(price=price))
        self.truth = Truth()
        self.saved = 0
        self.attempt = 0

    def live(self) -> None:
        """Let attempt follow attempt until all steps are done."""
        self.world.settle()
        while not self.live_one():
            self.world.seconds += self.random.uniform(5, 60)
            self.world.settle()

    def live_one(self) -> bool:
        """Let one attempt begin and end; return whether it did all that was left."""
        self.attempt += 1
        name = f"cats-{self.attempt}-0"
        self.world.seconds += self.random.uniform(5, 300)
        self.world.seconds = float(round(self.world.seconds))
        self.world.run_pod(name, node=f"n{self.attempt}")
        begin, start = self.world.seconds, self.saved
        life = self.random.uniform(600, 9000)
        needed = PREPARATION_SECONDS + (self.total - start) * STEP_SECONDS
        end = begin + float(round(min(life, needed)))
        while self.world.seconds + POLL_SECONDS < end:
            self.world.seconds += POLL_SECONDS
            self.poll(begin, start)
        self.world.seconds = end
        steps = self.steps_at(end - begin, start)
        self.end(name, steps=steps, start=start, end=end - begin)
        return steps == self.total

    def steps_at(self, seconds: float, start: int) -> int:
        return min(self.total, start + max(0, int((seconds - PREPARATION_SECONDS) / STEP_SECONDS)))

    def poll(self, begin: float, start: int) -> None:
        dice = self.random.random()
        if dice < 0.02:
            self.world.seconds += self.random.uniform(10, 120)  # nobody looks
            self.world.restart()
        steps = self.steps_at(self.world.seconds - begin, start)
        self.world.hears(Heard(report=self.report(steps, start)))
        self.world.look()

    def report(self, steps: int, start: int) -> ProgressReport:
        now = at(self.world.seconds)
        if steps == start:
            return make_report(0, attempt=self.attempt, stage="Preparing", progress=None)
        progress = make_progress(steps, total=self.total, time=now, samples_per_second=BATCH / STEP_SECONDS)
        return make_report(steps, attempt=self.attempt, progress=progress, **self.checkpoints(steps, start))

    def checkpoints(self, steps: int, start: int) -> dict[str, object]:
        saved = max(start, steps // SAVE_STEPS * SAVE_STEPS)
        found = {"latest_checkpoint": make_checkpoint(saved, time=at(self.world.seconds))} if saved else {}
        return found | {"resumed_from_step": start or None}

    def end(self, name: str, *, steps: int, start: int, end: float) -> None:
        done = steps == self.total
        saves = done or self.random.random() < 0.3
        saved = steps if saves else max(start, steps // SAVE_STEPS * SAVE_STEPS)
        self.truth.gpu_seconds += end * self.gpus
        self.truth.useful += (saved - start) * STEP_SECONDS * self.gpus
        self.truth.lost += (steps - saved) * STEP_SECONDS * self.gpus
        self.saved = saved
        dice = self.random.random()
        if not saves and dice < 0.4:
            # The node is gone with everything; nobody says at which step it was.
            if dice < 0.1:
                self.world.restart()
            self.world.cluster.drop_pod(name)
        else:
            code = 0 if done else 75 if saves else 137
            word = last_word(
                code,
                attempt=self.attempt,
                step=steps,
                progress=make_progress(steps, total=self.total, samples_per_second=BATCH / STEP_SECONDS),
                resumed_from_step=start or None,
                latest_checkpoint=make_checkpoint(saved, time=at(self.world.seconds)) if saved else None,
            )
            node_goes = {} if done else {"reason": "Terminated"}
            self.world.end_pod(name, code, message=word, **node_goes)
        self.world.settle()


@pytest.mark.parametrize(("seed", "gpus"), [(0, 1), (1, 4), (2, 1)])
def test_a_history_of_spot_nodes_and_restarts_within_a_hundredth(seed: int, gpus: int) -> None:
    history = History(seed=seed, gpus=gpus)
    history.live()
    found, truth = history.world.status["accounting"], history.truth
    assert history.world.status["phase"] == "Complete"
    assert history.attempt > 5
    assert found["gpuSeconds"] == pytest.approx(truth.gpu_seconds, rel=0.01)
    assert found["usefulGpuSeconds"] == pytest.approx(truth.useful, rel=0.01)
    assert found["goodput"] == pytest.approx(truth.useful / truth.gpu_seconds, rel=0.01)
    assert found["lostGpuSeconds"] == pytest.approx(truth.lost, abs=0.01 * truth.gpu_seconds)
    cost, currency = found["estimatedCost"].split()
    assert (float(cost), currency) == (pytest.approx(truth.gpu_seconds / 1000, rel=0.01), "USD")
    attempts = history.world.status["attempts"]
    assert sum(item["gpuSeconds"] for item in attempts) <= found["gpuSeconds"]


def test_the_running_attempt_is_counted_but_not_worth_a_write_every_second() -> None:
    job = started()
    pod = make_pod(job, phase="Running", node="n1", status={"podIP": "10.0.0.7", "startTime": at()})
    job = after(job, ask(job, pod))
    assert "accounting" not in job["status"]
    assert after(job, ask(job, pod, seconds=59)) == job
    job = after(job, ask(job, pod, seconds=60))
    assert job["status"]["accounting"]["gpuSeconds"] == 60
    assert after(job, ask(job, pod, seconds=119)) == job
    news = make_report(7, progress=make_progress(7))
    status = ask(job, pod, seconds=90, heard=Heard(report=news)).status
    assert status is not None
    assert status.accounting is not None
    assert status.accounting.gpu_seconds == 90, "what is written for another reason is up to date"


def test_pods_that_wait_hold_nothing_and_each_pod_counts_for_itself() -> None:
    job = started(make_job(resources={"nodes": 2, "gpusPerNode": 2}, training={"batchSize": 4}))
    first = make_pod(job, phase="Running", node="n1", status={"startTime": at(0)})
    second = make_pod(job, rank=1, phase="Pending")
    job = after(job, ask(job, first, second, seconds=100))
    assert job["status"]["accounting"]["gpuSeconds"] == 200
    second = make_pod(job, rank=1, phase="Running", node="n2", status={"startTime": at(100)})
    job = after(job, ask(job, first, second, seconds=200))
    assert job["status"]["accounting"]["gpuSeconds"] == 600


def test_forgotten_pods_take_nothing_away() -> None:
    """After a restart of the operator nobody knows of a pod that went meanwhile."""
    job = started()
    pod = make_pod(job, phase="Running", node="n1", status={"startTime": at()})
    job = after(job, ask(job, pod, seconds=500))
    job = after(job, ask(job, seconds=520))
    assert (job["status"]["attempt"], job["status"]["accounting"]["gpuSeconds"]) == (2, 500)
