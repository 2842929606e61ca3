"""A model of the world around the operator: user, scheduler, kubelets, nodes, time, watches that lag or lose events.

The decisions and the writer are the real ones, on a cluster in memory; the operator may die at any write. A Hypothesis
state machine: its rules are what may happen, its invariants are the promises (reference: docs/concepts/tests.md), each
by name, and `teardown` is liveness: when the trouble ends, the job settles.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diffusion_api.outcomes import OF_CAUSE, Action, Cause
from diffusion_operator.errors import ClusterError, ConflictError, UnavailableError
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.metrics import Metrics
from diffusion_operator.reconcile import Reconciler
from diffusion_operator.settings import Settings
from diffusion_operator.state import SeenPod
from testkit.builders import NOW, Object, disrupted, last_word, make_job, make_node, make_profile
from testkit.fakes import Crash, MemoryCluster, SilentProgress

KEY = ("team-a", "cats")
UID = str(make_job()["metadata"]["uid"])
NODES = ("n1", "n2", "n3")
SETTLING_LOOKS = 60
CODES = {
    "done": 0,
    "bad config": 64,
    "bad data": 65,
    "input missing": 66,
    "storage": 69,
    "diverged": 70,
    "yielded": 75,
    "no permission": 77,
    "no gpu memory": 80,
    "lost the others": 81,
    "gpu fault": 82,
    "hang": 83,
    "fenced": 84,
    "crash": 1,
    "segfault": 139,
}
"""Ends that the trainer speaks of itself."""
DISK = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi."
KUBELETS: dict[str, Object] = {
    "disk": {"reason": "Evicted", "message": DISK},
    "rejected": {"reason": "UnexpectedAdmissionError", "message": "Allocate failed"},
    "node low on memory": {"reason": "Evicted", "message": "The node was low on resource: memory."},
    "node shuts down": {"reason": "Terminated", "message": "Pod was terminated in response to imminent node shutdown."},
    "critical pod": {"reason": "Preempting", "message": "Preempted in order to admit critical pod"},
    "kubelet": disrupted("TerminationByKubelet"),
}
"""Ends that the kubelet speaks of, without a word of the trainer's."""
CONTAINERS = {"host memory": ("OOMKilled", 137), "unknown": ("ContainerStatusUnknown", 137), "killed": ("Error", 143)}
"""Ends of the container without a word: reason and exit code."""
ENDINGS = sorted([*CODES, *KUBELETS, *CONTAINERS])
BLAMELESS = {*KUBELETS, *CONTAINERS, "yielded", "vanished", "lost", "evicted"} - {"disk", "rejected", "host memory"}
"""Ends that are nobody's failure."""
DISRUPTIONS = ("PreemptionByScheduler", "EvictionByEvictionAPI", "DeletionByTaintManager")
SPOT = "aws-node-termination-handler/spot-itn:NoSchedule"
LOST = "node.kubernetes.io/unreachable:NoExecute"
CHARGED = {str(outcome.cause) for outcome in OF_CAUSE.values() if outcome.action == Action.RETRY} | {
    str(Cause.REPEATED_CRASH)
}
BLAMELESS_CAUSES = {
    *(str(outcome.cause) for outcome in OF_CAUSE.values() if outcome.action == Action.RESUME),
    str(Cause.DEADLINE_EXCEEDED),
    str(Cause.PENDING_DEADLINE_EXCEEDED),
    str(Cause.GPU_HOURS_EXCEEDED),
}


def attempt_of(pod: str) -> int:
    """Return the attempt of a pod by its name; 0 is the preflight."""
    return 0 if pod.startswith("cats-preflight") else int(pod.split("-")[-2])


class World(RuleBasedStateMachine):
    """One job, an operator that may die at any write, and everything else."""

    preflight = False
    nodes = 1
    resources: ClassVar[Object] = {}
    policy: ClassVar[Object] = {"backoffLimit": 3}
    labels: ClassVar[dict[str, str]] = {}
    kind_of_cluster: ClassVar[type[MemoryCluster]] = MemoryCluster
    steps: ClassVar[int] = 0
    """Rules that were executed, over all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.now: datetime = NOW
        self.cluster = self.kind_of_cluster()
        self.cluster.add_profile(make_profile())
        resources = {"nodes": self.nodes, **self.resources}
        self.cluster.add_job(make_job(metadata={"labels": self.labels}, runPolicy=self.policy, resources=resources))
        self.where: dict[str, Object] = {name: make_node(name) for name in NODES}
        self.excused: set[str] = set()
        self.given_up: set[str] = set()
        self.ways: dict[int, set[str]] = {}
        self.news: list[Object] = []
        self.final: Object | None = None
        self.attempts_seen = 0
        self.generation_seen = 0
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
        for node in self.where.values():
            knowledge.pods.nodes.put(node)
        return operator

    def look(self) -> float | None:
        """Let the operator look at the job once, and start it anew if it dies of that."""
        try:
            return asyncio.run(self.operator.reconcile(UID))
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

    def node_of(self, pod: str) -> str:
        found: str = self.cluster.pods["team-a", pod]["spec"].get("nodeName", "")
        return found

    def alive(self, *phases: str) -> list[str]:
        """Pods that something can happen to: not on a lost node."""
        return [name for name in self.pods(*phases) if not self.is_lost(self.node_of(name))]

    def is_lost(self, node: str) -> bool:
        return node in self.where and "taints" in self.where[node]["spec"] and self._taint(node).startswith("node.")

    def _taint(self, node: str) -> str:
        return str(self.where[node]["spec"]["taints"][0]["key"])

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

    @precondition(lambda self: self.news)
    @rule(data=st.data())
    def old_news_is_heard_again(self, data: st.DataObject) -> None:
        """Late, twice, or in the wrong order; of pods that are long gone too."""
        item = copy.deepcopy(self.news[data.draw(st.integers(0, len(self.news) - 1))])
        knowledge = self.operator.knowledge
        (knowledge.jobs if item["kind"] == "DiffusionTrainingJob" else knowledge.pods).put(item)

    # What the world does.

    @precondition(lambda self: self.pods("Pending"))
    @rule(data=st.data(), node=st.sampled_from(NODES))
    def a_pod_runs(self, data: st.DataObject, node: str) -> None:
        name = data.draw(st.sampled_from(self.pods("Pending")))
        if not self.where[node]["spec"].get("taints"):
            self.run(name, node)

    def run(self, name: str, node: str) -> None:
        pod = self.cluster.pods["team-a", name]
        if not pod["spec"].get("nodeName"):
            pod = self.cluster.set_pod(name, spec={**pod["spec"], "nodeName": node})
        self.cluster.set_pod(name, status={"phase": "Running"})

    @precondition(lambda self: self.alive("Running"))
    @rule(data=st.data(), how=st.sampled_from(ENDINGS))
    def a_pod_ends(self, data: st.DataObject, how: str) -> None:
        self.end(data.draw(st.sampled_from(self.alive("Running"))), how)

    @rule(data=st.data(), node=st.sampled_from(NODES), how=st.sampled_from(ENDINGS), seen=st.booleans())
    def an_attempt_happens(self, data: st.DataObject, node: str, how: str, seen: bool) -> None:
        """From its pods to an end in one rule: left to the others alone, chance seldom gets to one, and in few ways."""
        if not self.pods("Pending"):
            self.time_passes(400)
            self.operator_looks()
        if not self.pods("Pending") or self.where[node]["spec"].get("taints"):
            return
        name = data.draw(st.sampled_from(self.pods("Pending")))
        self.run(name, node)
        if seen:
            self.everything_is_read_again()
        if name in self.alive("Running"):
            self.end(name, how)

    def end(self, name: str, how: str) -> None:
        attempt = attempt_of(name)
        self.ways.setdefault(attempt, set()).add(how)
        if how in KUBELETS:
            self.cluster.set_pod(name, status={"phase": "Failed", **copy.deepcopy(KUBELETS[how])})
            return
        reason, code = CONTAINERS.get(how, ("Error", CODES.get(how, 0)))
        word = last_word(code, attempt=attempt, step=100 * attempt) if how in CODES else ""
        finished = (self.now + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        state = {"exitCode": code, "message": word, "finishedAt": finished, "reason": reason}
        status = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "trainer", "state": {"terminated": state}}],
        }
        self.cluster.set_pod(name, status=status)

    @precondition(lambda self: self.alive("Running"))
    @rule(data=st.data(), reason=st.sampled_from(DISRUPTIONS), seen=st.booleans())
    def a_pod_is_evicted(self, data: st.DataObject, reason: str, seen: bool) -> None:
        """With all that is said of it: the condition, the container's end, the deletion."""
        name = data.draw(st.sampled_from(self.alive("Running")))
        self.cluster.set_pod(name, status={"phase": "Running", **disrupted(reason)})
        if seen:
            self.everything_is_read_again()
        self.vanish(name, seen=seen, how="evicted")

    @precondition(lambda self: self.alive("Pending", "Running"))
    @rule(data=st.data(), seen=st.booleans())
    def a_pod_vanishes(self, data: st.DataObject, seen: bool) -> None:
        self.vanish(data.draw(st.sampled_from(self.alive("Pending", "Running"))), seen=seen)

    def vanish(self, name: str, *, seen: bool, how: str = "vanished") -> None:
        self.ways.setdefault(attempt_of(name), set()).add(how)
        ready = [item["reason"] for item in self.status.get("conditions", []) if item["type"] == "PodsReady"]
        if ready == ["Starting"]:
            # Created and gone before anybody could write down that it had been seen: it is created again.
            self.excused.add(name)
        gone = self.cluster.drop_pod(name)
        if seen:
            self.operator.knowledge.pods.remove(gone)

    @rule(name=st.sampled_from(NODES), taint=st.sampled_from(["", SPOT, LOST]), heard=st.booleans())
    def a_node_changes(self, name: str, taint: str, heard: bool) -> None:
        """It is lost with its pods, is about to go, or is as before; back it ends the pods that were deleted."""
        self.where[name] = make_node(
            name, *([taint] if taint else []), ready="Unknown" if taint == LOST else "True", taint_added=self.seconds
        )
        if heard:
            self.operator.knowledge.pods.nodes.put(self.where[name])
        for pod in self.pods("Pending", "Running"):
            if self.node_of(pod) != name:
                continue
            if taint == LOST:
                self.ways.setdefault(attempt_of(pod), set()).add("lost")
                self.given_up.add(pod)
            elif "deletionTimestamp" in self.cluster.pods["team-a", pod]["metadata"]:
                self.vanish(pod, seen=heard)

    @property
    def seconds(self) -> float:
        return (self.now - NOW).total_seconds()

    @rule(seconds=st.sampled_from([1, 15, 400]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(seconds=st.sampled_from([-200, -5, 7200]))
    def the_clock_is_set(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.exists)
    @rule(suspend=st.booleans())
    def the_user_suspends_or_resumes(self, suspend: bool) -> None:
        self.cluster.change_spec(*KEY, suspend=suspend)

    @precondition(lambda self: self.exists)
    @rule(limit=st.integers(1, 4), valid=st.booleans())
    def the_user_edits(self, limit: int, valid: bool) -> None:
        """What may be changed, to something that can be run, or to something that cannot."""
        notifications = [] if valid else [{"on": ["Complete"], "webhookRef": {"name": "hook"}}]
        self.cluster.change_spec(*KEY, runPolicy={**self.policy, "backoffLimit": limit}, notifications=notifications)

    # What must hold at any moment.

    @invariant()
    def world_goes_on(self) -> None:
        """No promise: keeps the news that may be heard again, and counts."""
        World.steps += 1
        known = {id(item) for item in self.news}
        current = [*self.cluster.jobs.values(), *self.cluster.pods.values()]
        self.news = [*self.news, *(item for item in current if id(item) not in known)][-20:]

    @invariant()
    def at_most_one_attempt_lives(self) -> None:
        pods = [SeenPod(self.cluster.pods["team-a", name]) for name in self.pods("Pending", "Running")]
        # A node that has stopped answering keeps its pod for ever; it is fenced, and the next attempt does not wait.
        live = {pod.attempt for pod in pods if not pod.stuck(self.now) and pod.name not in self.given_up}
        assert len(live) <= 1, f"two attempts at once: {live}"

    @invariant()
    def numbers_only_grow_and_are_used_once(self) -> None:
        number = self.status.get("attempt", 0)
        assert number >= self.attempts_seen, "an attempt's number was taken back"
        self.attempts_seen = number
        assert all(attempt_of(name) <= number for name in self.cluster.created), "a pod before its number was written"
        attempts = [name for name in self.cluster.created if attempt_of(name)]  # a preflight is repeated as need be
        twice = {name for name in attempts if attempts.count(name) > 1}
        assert twice <= self.excused, f"created twice: {twice - self.excused}"
        listed = [attempt["number"] for attempt in self.status.get("attempts", [])]
        assert listed == sorted(set(listed), reverse=True), "a number was used twice"

    @invariant()
    def no_attempt_is_lost(self) -> None:
        """What counts as preempted has existed: a number is not used up by a crash of the operator."""
        for attempt in self.status.get("attempts", []):
            existed = f"cats-{attempt['number']}-0" in self.cluster.created
            assert existed or attempt.get("cause") in {None, "Suspended"}, f"nothing was started: {attempt}"

    @invariant()
    def final_is_final(self) -> None:
        if self.final is not None:
            assert self.status == self.final, "what was final has changed"
        elif self.status.get("phase") in {"Complete", "Failed"}:
            self.final = copy.deepcopy(self.status)

    @invariant()
    def preemption_is_never_charged(self) -> None:
        failures = self.status.get("counters", {}).get("failures", 0)
        failures -= self.preflight_failures
        attempts = self.status.get("attempts", [])
        charged = sum(attempt.get("cause") in CHARGED for attempt in attempts)
        assert failures == charged or len(attempts) == 10, "charged for what is no failure"

    @invariant()
    def the_cause_is_the_true_one(self) -> None:
        """An attempt whose pods were all disrupted is not said to have failed."""
        for attempt in self.status.get("attempts", []):
            ways = self.ways.get(attempt["number"], set())
            if ways and ways <= BLAMELESS and attempt.get("endedAt"):
                assert attempt["cause"] in BLAMELESS_CAUSES, f"not the true cause after {ways}: {attempt}"

    @invariant()
    def observed_generation_only_grows(self) -> None:
        seen = self.status.get("observedGeneration", 0)
        assert seen >= self.generation_seen, "an older spec was observed after a newer one"
        self.generation_seen = seen
        if self.exists:
            assert seen <= self.cluster.jobs[KEY]["metadata"]["generation"]

    # What must come about when nothing more happens.

    def teardown(self) -> None:
        """Let the trouble end: the job comes to its end, however it was left. Lost nodes stay lost."""
        self.cluster.fail_at, self.cluster.errors = None, []
        self.the_user_edits(3, valid=True)
        self.cluster.change_spec(*KEY, suspend=False)
        self.settle(lambda: self.status.get("phase") in {"Complete", "Failed"})
        looks: list[Any] = [self.look() for _ in range(3)]
        before = len(self.cluster.writes)
        assert self.look() is None, looks
        assert self.status == self.final
        assert len(self.cluster.writes) == before, "a settled job causes no writes"

    def settle(self, done: Callable[[], bool]) -> None:
        """Let time pass and pods do their work until it is done."""
        for node in self.where.values():
            self.operator.knowledge.pods.nodes.put(node)
        for _ in range(SETTLING_LOOKS):
            asyncio.run(self.operator.knowledge.refresh(self.cluster, (), lambda _uid: None))
            again = self.look()
            self.final_is_final()
            self.at_most_one_attempt_lives()
            if done():
                return
            self.something_comes_next(again)
            self.now += timedelta(seconds=400)
            for (_, name), pod in list(self.cluster.pods.items()):
                self.help_along(name, pod)
        assert done(), f"it does not settle: {self.status}"

    def something_comes_next(self, again: float | None) -> None:
        """A timer, or a pod of which there will be news; pods of lost nodes say nothing any more."""
        assert again is not None or self.alive("Pending", "Running"), "nothing would ever happen again"

    def help_along(self, name: str, pod: Object) -> None:
        if self.is_lost(self.node_of(name)):
            return
        if "deletionTimestamp" in pod["metadata"]:
            self.vanish(name, seen=True)
        elif pod["status"]["phase"] == "Pending":
            well = next((node for node in NODES if not self.where[node]["spec"].get("taints")), None)
            if well is None:
                self.where["n1"] = make_node("n1")
                self.operator.knowledge.pods.nodes.put(self.where["n1"])
            self.run(name, well or "n1")
        elif pod["status"]["phase"] == "Running":
            self.end(name, "done")
