"""Whatever happens in whatever order, crashes between any two writes included: the promises hold and the job settles.

A model of the world (user, scheduler, kubelets, time, watches that lag or lose events) around the real decisions and
the real writer, on a cluster in memory.
"""

import asyncio
import copy
from datetime import datetime, timedelta
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diffusion_operator import timestamps
from diffusion_operator.errors import ClusterError, ConflictError, UnavailableError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.metrics import Metrics
from diffusion_operator.reconcile import Reconciler
from diffusion_operator.settings import Settings
from diffusion_operator.state import SeenPod
from testkit.builders import NOW, Object, last_word, make_job, make_profile
from testkit.fakes import Crash, MemoryCluster, SilentProgress

KEY = ("team-a", "cats")
ENDINGS = {
    "done": 0,
    "bad config": 64,
    "storage": 69,
    "yielded": 75,
    "no memory": 80,
    "hang": 83,
    "crash": 1,
}
SETTLING_LOOKS = 60


def attempt_of(pod: str) -> int:
    """Return the attempt of a pod by its name; 0 is the preflight."""
    return 0 if pod.startswith("cats-preflight") else int(pod.split("-")[-2])


class World(RuleBasedStateMachine):
    """One job, an operator that may die at any write, and everything else."""

    preflight = False
    nodes = 1
    policy: ClassVar[Object] = {"backoffLimit": 3}

    def __init__(self) -> None:
        super().__init__()
        self.now: datetime = NOW
        self.cluster = MemoryCluster()
        self.cluster.add_profile(make_profile())
        self.cluster.add_job(make_job(runPolicy=self.policy, resources={"nodes": self.nodes}))
        self.excused: set[str] = set()
        self.final: Object | None = None
        self.attempts_seen = 0
        self.preflight_failures = 0
        self.operator = self.start()

    def start(self) -> Reconciler:
        """Start an operator that knows nothing, and let it read the cluster."""
        knowledge = Knowledge()
        operator = Reconciler(
            settings=Settings(trainer_image="t", preflight=self.preflight),
            cluster=self.cluster,
            knowledge=knowledge,
            progress=SilentProgress(),
            metrics=Metrics(version="0", jobs=lambda: knowledge.jobs, depth=lambda: 0),
            clock=lambda: self.now,
        )
        asyncio.run(knowledge.refresh(self.cluster, (), lambda _uid: None))
        return operator

    def look(self) -> float | None:
        """Let the operator look at the job once, and start it anew if it dies of that."""
        uid = make_job()["metadata"]["uid"]
        try:
            return asyncio.run(self.operator.reconcile(uid))
        except Crash:
            self.operator = self.start()
        except ClusterError:
            pass
        return 0

    @property
    def exists(self) -> bool:
        return KEY in self.cluster.jobs

    @property
    def status(self) -> Object:
        """The job's status; the last one, when it is gone."""
        found: Object = self.cluster.jobs[KEY].get("status", {}) if self.exists else self.final or {}
        return found

    def pods(self, *phases: str) -> list[str]:
        return [name for (_, name), pod in self.cluster.pods.items() if pod["status"]["phase"] in phases]

    # What the operator does.

    @rule()
    def operator_looks(self) -> None:
        self.look()

    @rule(write=st.integers(1, 6), when=st.sampled_from(["before", "after", "unanswered"]))
    def operator_dies_soon(self, write: int, when: str) -> None:
        self.cluster.fail_at = (write, when)
        for _ in range(3):
            self.look()
        self.cluster.fail_at = None

    @rule(error=st.sampled_from([UnavailableError("503"), ConflictError("409")]))
    def api_server_errs(self, error: ClusterError) -> None:
        self.cluster.errors = [error]
        self.look()
        self.cluster.errors = []

    @rule()
    def everything_is_read_again(self) -> None:
        asyncio.run(self.operator.knowledge.refresh(self.cluster, (), lambda _uid: None))

    @precondition(lambda self: self.exists)
    @rule()
    def only_jobs_are_heard_of(self) -> None:
        """News of pods is late."""
        self.operator.knowledge.jobs.put(copy.deepcopy(self.cluster.jobs[KEY]))

    # What the world does.

    @precondition(lambda self: self.pods("Pending"))
    @rule(data=st.data())
    def a_pod_runs(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.pods("Pending")))
        pod = self.cluster.pods["team-a", name]
        self.cluster.set_pod(name, spec={**pod["spec"], "nodeName": "n1"}, status={"phase": "Running"})

    @precondition(lambda self: self.pods("Running"))
    @rule(data=st.data(), how=st.sampled_from(sorted(ENDINGS)))
    def a_pod_ends(self, data: st.DataObject, how: str) -> None:
        self.end(data.draw(st.sampled_from(self.pods("Running"))), ENDINGS[how])

    def end(self, name: str, code: int) -> None:
        attempt = attempt_of(name)
        finished = (self.now + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        word = last_word(code, attempt=attempt, step=100 * attempt)
        state = {"exitCode": code, "message": word, "finishedAt": finished}
        status = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "trainer", "state": {"terminated": state}}],
        }
        self.cluster.set_pod(name, status=status)

    @precondition(lambda self: self.pods("Pending", "Running"))
    @rule(data=st.data(), seen=st.booleans())
    def a_pod_vanishes(self, data: st.DataObject, seen: bool) -> None:
        name = data.draw(st.sampled_from(self.pods("Pending", "Running")))
        self.vanish(name, seen=seen)

    def vanish(self, name: str, *, seen: bool) -> None:
        ready = [item["reason"] for item in self.status["conditions"] if item["type"] == "PodsReady"]
        if ready == ["Starting"]:
            # Created and gone before anybody could write down that it had been seen: it is created again.
            self.excused.add(name)
        gone = self.cluster.drop_pod(name)
        if seen:
            self.operator.knowledge.pods.remove(gone)

    @rule(seconds=st.sampled_from([1, 15, 400]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.exists)
    @rule(suspend=st.booleans())
    def the_user_suspends_or_resumes(self, suspend: bool) -> None:
        self.cluster.change_spec(*KEY, suspend=suspend)

    # What must hold at any moment.

    @invariant()
    def at_most_one_attempt_lives(self) -> None:
        pods = [SeenPod(self.cluster.pods["team-a", name]) for name in self.pods("Pending", "Running")]
        # A node that has stopped answering keeps its pod for ever; it is fenced, and the next attempt does not wait.
        live = {pod.attempt for pod in pods if not pod.stuck(self.now)}
        assert len(live) <= 1, f"two attempts at once: {live}"

    @invariant()
    def numbers_only_grow_and_are_used_once(self) -> None:
        number = self.status.get("attempt", 0)
        assert number >= self.attempts_seen
        self.attempts_seen = number
        assert all(attempt_of(name) <= number for name in self.cluster.created)
        attempts = [name for name in self.cluster.created if attempt_of(name)]  # a preflight is repeated as need be
        twice = {name for name in attempts if attempts.count(name) > 1}
        assert twice <= self.excused
        listed = [attempt["number"] for attempt in self.status.get("attempts", [])]
        assert listed == sorted(set(listed), reverse=True)

    @invariant()
    def no_attempt_is_lost(self) -> None:
        """What counts as preempted has existed: a number is not used up by a crash of the operator."""
        for attempt in self.status.get("attempts", []):
            existed = f"cats-{attempt['number']}-0" in self.cluster.created
            assert existed or attempt.get("cause") in {None, "Suspended"}

    @invariant()
    def final_is_final(self) -> None:
        if self.final is not None:
            assert self.status == self.final
        elif self.status.get("phase") in {"Complete", "Failed"}:
            self.final = copy.deepcopy(self.status)

    @invariant()
    def preemption_is_never_charged(self) -> None:
        failures = self.status.get("counters", {}).get("failures", 0)
        failures -= self.preflight_failures
        crashes = sum(attempt.get("cause") in {"Crash", "RepeatedCrash"} for attempt in self.status.get("attempts", []))
        kept_all = len(self.status.get("attempts", [])) < 10
        assert failures == crashes or not kept_all

    # What must come about when nothing more happens.

    def teardown(self) -> None:
        """Let the trouble end: the job completes, however it was left."""
        self.cluster.fail_at, self.cluster.errors = None, []
        self.cluster.change_spec(*KEY, suspend=False)
        for _ in range(SETTLING_LOOKS):
            asyncio.run(self.operator.knowledge.refresh(self.cluster, (), lambda _uid: None))
            self.look()
            self.final_is_final()
            self.at_most_one_attempt_lives()
            if self.status.get("phase") in {"Complete", "Failed"}:
                break
            self.now += timedelta(seconds=400)
            for (_, name), pod in list(self.cluster.pods.items()):
                self.help_along(name, pod)
        assert self.status.get("phase") in {"Complete", "Failed"}, self.status
        looks: list[Any] = [self.look() for _ in range(3)]
        before = len(self.cluster.writes)
        assert self.look() is None, looks
        assert len(self.cluster.writes) == before, "a settled job causes no writes"

    def help_along(self, name: str, pod: Object) -> None:
        if "deletionTimestamp" in pod["metadata"]:
            self.vanish(name, seen=True)
        elif pod["status"]["phase"] == "Pending":
            self.cluster.set_pod(name, spec={**pod["spec"], "nodeName": "n1"}, status={"phase": "Running"})
        elif pod["status"]["phase"] == "Running":
            self.end(name, 0)


class TwoNodesWorld(World):
    """The same with two pods, which start and end together."""

    nodes = 2


class PreflightWorld(World):
    """The same with a preflight before the first attempt."""

    preflight = True
    crashes = 0

    def look(self) -> float | None:
        again = super().look()
        if not self.status.get("attempt"):
            self.preflight_failures = self.status.get("counters", {}).get("failures", 0)
        return again

    def end(self, name: str, code: int) -> None:
        super().end(name, code)
        # Without a GPU it cannot run out of the GPU's memory; what says so all the same has crashed.
        self.crashes += code in {ENDINGS["crash"], ENDINGS["no memory"]} and attempt_of(name) == 0

    @precondition(lambda self: self.exists)
    @rule(hows=st.lists(st.sampled_from(["done", "storage", "yielded", "crash"]), min_size=1, max_size=4))
    def pods_end_and_are_followed(self, hows: list[str]) -> None:
        """Chance alone seldom gets past the preflight, or to a second one."""
        for how in hows:
            for name in self.pods("Pending", "Running"):
                self.end(name, ENDINGS[how])
            for _ in range(2):
                self.everything_is_read_again()
                self.look()
                self.now += timedelta(seconds=400)

    @invariant()
    def each_of_its_pods_is_judged_once_and_only_crashes_are_charged(self) -> None:
        if self.status.get("attempt"):
            return
        counters = self.status.get("counters", {})
        judged = sum(counters.get(name, 0) for name in ("preemptions", "infrastructure", "failures"))
        assert judged <= len({name for name in self.cluster.created if attempt_of(name) == 0})
        assert counters.get("failures", 0) <= self.crashes

    @invariant()
    def no_attempt_before_the_preflight_has_passed(self) -> None:
        passed = {"type": "PreflightPassed", "status": "True"}.items()
        attempts = [name for name in self.cluster.created if attempt_of(name)]
        assert not attempts or any(passed <= found.items() for found in self.status.get("conditions", []))

    @invariant()
    def no_preflight_after_it(self) -> None:
        first = next((i for i, name in enumerate(self.cluster.created) if attempt_of(name)), None)
        assert first is None or all(attempt_of(name) for name in self.cluster.created[first:])


class LimitedWorld(World):
    """The same with every limit of the run, a clock that is set, and deletion by time."""

    policy: ClassVar[Object] = {
        "backoffLimit": 3,
        "activeDeadlineSeconds": 3000,
        "pendingDeadlineSeconds": 700,
        "maxGPUHours": 0.5,
        "ttlSecondsAfterFinished": 500,
    }

    def __init__(self) -> None:
        super().__init__()
        self.created_before = 0
        self.created_at_the_end: int | None = None
        self.told: tuple[int, str] | None = None
        self.known_to_be_gone = False

    def look(self) -> float | None:
        again = super().look()
        if not self.exists:  # the garbage collector
            for _, name in list(self.cluster.pods):
                self.operator.knowledge.pods.remove(self.cluster.drop_pod(name))
        return again

    @rule(seconds=st.sampled_from([-200, 700, 3000, 86400]))
    def the_clock_is_set(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @invariant()
    def nothing_is_started_beyond_the_deadline(self) -> None:
        new = self.cluster.created[self.created_before :]
        self.created_before += len(new)
        start = self.status.get("startTime")
        if new and start is not None:
            assert self.now < timestamps.from_text(start) + timedelta(seconds=self.policy["activeDeadlineSeconds"])

    @invariant()
    def it_goes_only_when_its_time_is_over(self) -> None:
        if not self.exists and not self.known_to_be_gone:
            self.known_to_be_gone = True  # the clock may be set back after that
            assert self.final is not None, "deleted before it was done"
            ends = [item for item in self.final["conditions"] if item["type"] in {"Complete", "Failed"}]
            ttl = timedelta(seconds=self.policy["ttlSecondsAfterFinished"])
            assert self.now >= timestamps.from_text(ends[0]["lastTransitionTime"]) + ttl

    @invariant()
    def nothing_is_made_anew_after_the_end(self) -> None:
        if self.final is not None:
            self.created_at_the_end = self.created_at_the_end or len(self.cluster.created)
            assert len(self.cluster.created) == self.created_at_the_end

    @invariant()
    def what_the_operator_stopped_was_not_preempted(self) -> None:
        reasons = {"DeadlineExceeded", "GPUHoursExceeded", "PendingDeadlineExceeded"}
        said = [item["reason"] for item in self.status.get("conditions", []) if item["type"] == "Progressing"]
        attempts = self.status.get("attempts", [])
        if attempts and not attempts[0].get("endedAt") and said and said[0] in reasons:
            self.told = (attempts[0]["number"], said[0])
        if self.told and attempts and attempts[0]["number"] == self.told[0] and attempts[0].get("endedAt"):
            assert attempts[0]["cause"] not in {"Preempted", "NodeLost", "Crash"}

    def teardown(self) -> None:
        """Let the trouble end: however it was left, the job comes to its end and goes."""
        self.cluster.fail_at, self.cluster.errors = None, []
        if self.exists:
            self.cluster.change_spec(*KEY, suspend=False)
        for _ in range(SETTLING_LOOKS):
            asyncio.run(self.operator.knowledge.refresh(self.cluster, (), lambda _uid: None))
            again = self.look()
            if not self.exists:
                break
            assert again is not None or self.pods("Pending", "Running"), "nothing would ever happen again"
            self.final_is_final()
            self.nothing_is_made_anew_after_the_end()
            self.now += timedelta(seconds=400)
            for (_, name), pod in list(self.cluster.pods.items()):
                self.help_along(name, pod)
        assert not self.exists, self.status


TestLimitedWorld = LimitedWorld.TestCase
TestLimitedWorld.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPreflightWorld = PreflightWorld.TestCase
TestPreflightWorld.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestTwoNodesWorld = TwoNodesWorld.TestCase
TestTwoNodesWorld.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
