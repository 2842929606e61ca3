"""The world's variants: several pods, preflight, limits, several choices, a job that is deleted, a queue."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from diffusion_api import names
from diffusion_operator import timestamps
from testkit.builders import Object, make_profile
from testkit.fakes import MemoryCluster
from testkit.queued import QueuedCluster
from testkit.world import KEY, NODES, UID, World, attempt_of


class TwoNodesWorld(World):
    """Two pods, which start and end together."""

    nodes = 2


class PreflightWorld(World):
    """A preflight before the first attempt."""

    preflight = True
    crashes = 0

    def look(self) -> float | None:
        again = super().look()
        if not self.status.get("attempt"):
            self.preflight_failures = self.status.get("counters", {}).get("failures", 0)
        return again

    def end(self, name: str, how: str) -> None:
        super().end(name, how)
        # Without a GPU it cannot run out of the GPU's memory; what says so all the same has crashed.
        charged = {"crash", "segfault", "no gpu memory", "disk", "host memory"}
        self.crashes += how in charged and attempt_of(name) == 0

    @precondition(lambda self: self.exists)
    @rule(hows=st.lists(st.sampled_from(["done", "storage", "yielded", "crash"]), min_size=1, max_size=4))
    def pods_end_and_are_followed(self, hows: list[str]) -> None:
        """Chance alone seldom gets past the preflight, or to a second one."""
        for how in hows:
            for name in self.alive("Pending", "Running"):
                self.end(name, how)
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
        tried = {name for name in self.cluster.created if attempt_of(name) == 0}
        assert judged <= len(tried), "a pod of the preflight was judged twice"
        assert counters.get("failures", 0) <= self.crashes, "charged to a preflight that did not crash"

    @invariant()
    def no_attempt_before_the_preflight_has_passed(self) -> None:
        passed = {"type": "PreflightPassed", "status": "True"}.items()
        attempts = [name for name in self.cluster.created if attempt_of(name)]
        has_passed = any(passed <= found.items() for found in self.status.get("conditions", []))
        assert not attempts or has_passed, "an attempt before its preflight had passed"

    @invariant()
    def no_preflight_after_it(self) -> None:
        first = next((i for i, name in enumerate(self.cluster.created) if attempt_of(name)), None)
        tidy = first is None or all(attempt_of(name) for name in self.cluster.created[first:])
        assert tidy, "a preflight after an attempt"


class LimitedWorld(World):
    """Every limit of the run, and deletion by time."""

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

    @rule(seconds=st.sampled_from([700, 3000, 86400]))
    def it_is_long_after(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @invariant()
    def nothing_is_started_beyond_the_deadline(self) -> None:
        new = self.cluster.created[self.created_before :]
        self.created_before += len(new)
        start = self.status.get("startTime")
        if new and start is not None:
            deadline = timestamps.from_text(start) + timedelta(seconds=self.policy["activeDeadlineSeconds"])
            assert self.now < deadline, f"started beyond the deadline: {new}"

    @invariant()
    def it_goes_only_when_its_time_is_over(self) -> None:
        if not self.exists and not self.known_to_be_gone:
            self.known_to_be_gone = True  # the clock may be set back after that
            assert self.final is not None, "deleted before it was done"
            ends = [item for item in self.final["conditions"] if item["type"] in {"Complete", "Failed"}]
            ttl = timedelta(seconds=self.policy["ttlSecondsAfterFinished"])
            assert self.now >= timestamps.from_text(ends[0]["lastTransitionTime"]) + ttl, "deleted before its time"

    @invariant()
    def nothing_is_made_anew_after_the_end(self) -> None:
        if self.final is not None:
            self.created_at_the_end = self.created_at_the_end or len(self.cluster.created)
            assert len(self.cluster.created) == self.created_at_the_end, "made anew after the end"

    @invariant()
    def what_the_operator_stopped_was_not_preempted(self) -> None:
        reasons = {"DeadlineExceeded", "GPUHoursExceeded", "PendingDeadlineExceeded"}
        said = [item["reason"] for item in self.status.get("conditions", []) if item["type"] == "Progressing"]
        attempts = self.status.get("attempts", [])
        if attempts and not attempts[0].get("endedAt") and said and said[0] in reasons:
            self.told = (attempts[0]["number"], said[0])
        for attempt in attempts:
            if self.told is None or attempt["number"] != self.told[0] or not attempt.get("endedAt"):
                continue
            cause = attempt["cause"]
            assert cause not in {"Preempted", "NodeLost", "Crash"}, f"stopped by the operator, and said to be {cause}"

    def teardown(self) -> None:
        """Let the trouble end: however it was left, the job comes to its end and goes."""
        self.cluster.fail_at, self.cluster.errors = None, []
        if self.exists:
            self.the_user_edits(3, valid=True)
            self.cluster.change_spec(*KEY, suspend=False)
        self.settle(lambda: not self.exists)


class ChoicesWorld(World):
    """Two profiles and spot nodes, on which there may be no room."""

    smaller = "smaller"
    """Name of the other profile, and its image, by which its pods are known."""
    resources: ClassVar[Object] = {"capacity": "Any", "alternatives": [{"profile": smaller}]}

    def __init__(self) -> None:
        super().__init__()
        self.cluster.add_profile(make_profile(name=self.smaller, image=self.smaller, spot=None))
        self.operator = self.start()

    @rule(rounds=st.integers(1, 4), why=st.sampled_from(["Insufficient nvidia.com/gpu", "node(s) didn't match"]))
    def there_is_no_room_for_long(self, rounds: int, why: str) -> None:
        """Chance alone seldom goes round all choices."""
        said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        message = f"0/3 nodes are available: 3 {why}."
        for _ in range(rounds):
            for name in self.pods("Pending"):
                if "nodeName" not in self.cluster.pods["team-a", name]["spec"]:
                    conditions = [said | {"message": message}]
                    self.cluster.set_pod(name, status={"phase": "Pending", "conditions": conditions})
            for _ in range(3):
                self.everything_is_read_again()
                self.look()
                self.now += timedelta(seconds=101)

    @invariant()
    def pods_are_of_the_choice_that_the_status_says(self) -> None:
        attempts = {item["number"]: item for item in self.status.get("attempts", [])}
        for (_, name), pod in self.cluster.pods.items():
            attempt = attempts.get(attempt_of(name))
            if attempt is not None:
                found = pod["spec"]["containers"][0]["image"] == self.smaller, "nodeSelector" in pod["spec"]
                wanted = attempt["profile"] == self.smaller, attempt["capacity"] == "Spot"
                assert found == wanted, f"pod {name} is of another choice than its attempt"
        if attempts:
            newest, placement = attempts[self.status["attempt"]], self.status["placement"]
            assert (newest["profile"], newest["capacity"]) == (placement["profile"], placement["capacity"])

    @invariant()
    def a_move_is_no_preemption_and_costs_no_history(self) -> None:
        causes = [item.get("cause") for item in self.status.get("attempts", [])]
        if len(causes) < 10:
            taken = sum(cause in {"Preempted", "NodeLost"} for cause in causes)
            assert self.status.get("counters", {}).get("preemptions", 0) == taken, "a move counts as a preemption"
        assert ("NoCapacity", "NoCapacity") not in pairwise(causes), "moves push out what the job has been through"


class DeletionWorld(World):
    """A job that its user deletes at some time, whatever state it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.created_when_known: int | None = None
        self.last: Object = {}

    @property
    def status(self) -> Object:
        return super().status if self.exists else self.last

    @precondition(lambda self: self.exists and self.cluster.created)
    @rule(heard=st.booleans())
    def the_user_deletes_it(self, heard: bool) -> None:
        """At once, for the pods go with their owner and nothing else holds a job back."""
        self.last = self.status
        job = self.cluster.jobs.pop(KEY)
        if heard:
            self.operator.knowledge.jobs.remove(job)

    @rule()
    def the_garbage_is_collected(self) -> None:
        if not self.exists:
            for _, name in list(self.cluster.pods):
                self.operator.knowledge.pods.remove(self.cluster.drop_pod(name))

    def old_jobs(self) -> None:
        """What is gone is not heard of again."""
        self.news = [item for item in self.news if item["kind"] == "Pod"]

    @invariant()
    def nothing_is_started_for_a_job_that_is_known_to_be_gone(self) -> None:
        if self.exists:
            return
        self.old_jobs()
        if self.operator.knowledge.jobs.get(UID) is None:
            self.created_when_known = self.created_when_known or len(self.cluster.created)
            assert len(self.cluster.created) == self.created_when_known, "a pod for a job that is gone"

    @invariant()
    def every_pod_has_an_owner_that_takes_it_along(self) -> None:
        for pod in self.cluster.pods.values():
            (owner,) = pod["metadata"]["ownerReferences"]
            assert (owner["uid"], owner["controller"]) == (UID, True), "an orphan that nobody collects"

    def teardown(self) -> None:
        """Let the trouble end: of a job that is gone nothing is left, in the cluster and in memory."""
        if self.exists:
            super().teardown()
            return
        self.cluster.fail_at, self.cluster.errors = None, []
        self.the_garbage_is_collected()
        for _ in range(3):
            self.everything_is_read_again()
            self.look()
            self.the_garbage_is_collected()
        before = len(self.cluster.writes)
        assert self.look() is None
        assert (len(self.cluster.writes), self.cluster.pods) == (before, {})
        knowledge = self.operator.knowledge
        left = (knowledge.jobs.get(UID), knowledge.pods.of_job(UID), UID in knowledge.told)
        assert left == (None, (), False), "something is remembered of a job that is gone"


class QueuedWorld(World):
    """Two pods in a queue of Kueue, which admits, evicts, and holds on to what has ended."""

    nodes = 2
    labels: ClassVar[dict[str, str]] = {names.LABEL_QUEUE: "main"}
    kind_of_cluster: ClassVar[type[MemoryCluster]] = QueuedCluster
    cluster: QueuedCluster

    def look(self) -> float | None:
        if self.final is not None:  # what follows from the end takes a few looks, and each hears of the one before
            self.everything_is_read_again()
        return super().look()

    def run(self, name: str, node: str) -> None:
        if "schedulingGates" not in self.cluster.pods["team-a", name]["spec"]:
            super().run(name, node)

    @rule()
    def kueue_admits(self) -> None:
        self.cluster.admit()

    @rule()
    def kueue_evicts(self) -> None:
        for name in self.cluster.evict(self.seconds):
            self.ways.setdefault(attempt_of(name), set()).add("evicted")

    @rule(evicted=st.booleans())
    def admitted_pods_run_and_end(self, evicted: bool) -> None:
        """Chance alone seldom gets both ranks this far: they are evicted, or one succeeds and the other does not."""
        self.everything_is_read_again()
        self.look()
        self.kueue_admits()
        well = [node for node in NODES if not self.where[node]["spec"].get("taints")]
        for name in self.pods("Pending") if well else []:
            self.run(name, well[0])
        if evicted:
            self.kueue_evicts()
        for name in self.alive("Running"):
            self.end(name, "yielded" if evicted or name.endswith("-1") else "done")

    def end(self, name: str, how: str) -> None:
        super().end(name, how)
        self.cluster.settle()

    def vanish(self, name: str, *, seen: bool, how: str = "vanished") -> None:
        """What Kueue holds does not vanish: it ends."""
        pod = self.cluster.pods["team-a", name]
        if "finalizers" not in pod["metadata"]:
            super().vanish(name, seen=seen, how=how)
        elif pod["spec"].get("nodeName"):
            self.ways.setdefault(attempt_of(name), set()).add(how)
            self.cluster.end_deletion(name, self.seconds)

    def help_along(self, name: str, pod: Object) -> None:
        self.cluster.admit()
        pod = self.cluster.pods.get(("team-a", name), pod)
        if name in self.pods("Pending", "Running"):
            super().help_along(name, pod)

    @invariant()
    def pods_of_an_attempt_are_in_one_group(self) -> None:
        groups: dict[int, set[str]] = {}
        for (_, name), pod in self.cluster.pods.items():
            groups.setdefault(attempt_of(name), set()).add(pod["metadata"]["labels"][names.LABEL_POD_GROUP])
        assert all(len(found) == 1 for found in groups.values()), f"an attempt in several groups: {groups}"

    def teardown(self) -> None:
        """However it was left, the job comes to its end, and nothing of it holds quota any more."""
        super().teardown()
        held = [name for (_, name), pod in self.cluster.pods.items() if "finalizers" in pod["metadata"]]
        assert not held, f"quota is held for ever: {held}"
