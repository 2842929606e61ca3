"""Each promise of the world model is broken once, by a bug that is planted: the model sees it, and names the promise.

Told are short stories without chance; `make nightly` shows that chance finds these bugs as well.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from diffusion_api.outcomes import OF_CAUSE, Action, Cause
from diffusion_operator import decide as deciding
from diffusion_operator.desired import pod, pod_group
from diffusion_operator.knowledge import Knowledge
from diffusion_operator.policies import attempt_ended, attempt_runs, attempt_starts, evidence, preflight, stopping, ttl
from diffusion_operator.policies.finished import stays_finished
from diffusion_operator.policies.limits import limit_is_reached
from diffusion_operator.policies.preflight import preflight_first
from diffusion_operator.policies.run_policy import backs_off
from diffusion_operator.policies.ttl import has_outlived_itself
from diffusion_operator.reconcile import Reconciler
from diffusion_operator.state import Case, SeenPod
from testkit.world import LOST, World
from testkit.worlds import ChoicesWorld, DeletionWorld, LimitedWorld, PreflightWorld, QueuedWorld

FIRST = "cats-1-0"


class Bugs:
    """What is wrong with the operator, one at a time."""

    def __init__(self, plant: pytest.MonkeyPatch) -> None:
        self.plant = plant

    def _policies(self, policy: Any, *instead: Any) -> None:
        at = deciding.POLICIES.index(policy)
        self.plant.setattr(deciding, "POLICIES", (*deciding.POLICIES[:at], *instead, *deciding.POLICIES[at + 1 :]))

    def running_pods_are_taken_for_dead(self) -> None:
        self.plant.setattr(SeenPod, "live", lambda _pod, _now: False)

    def numbers_are_used_again(self) -> None:
        add = attempt_starts.add_attempt

        def again(status: Any, attempt: Any, *, keep: int) -> Any:
            return add(status, attempt.model_copy(update={"number": max(1, status.attempt)}), keep=keep)

        self.plant.setattr(attempt_starts, "add_attempt", again)

    def what_is_missing_counts_as_lost(self) -> None:
        for module in (attempt_starts, attempt_ended):
            self.plant.setattr(module, "is_starting", lambda _case: False)

    def preemption_uses_up_the_budget(self) -> None:
        self.plant.setitem(OF_CAUSE, Cause.PREEMPTED, replace(OF_CAUSE[Cause.PREEMPTED], action=Action.RETRY))

    def places_are_never_given_back(self) -> None:
        self.plant.setattr(deciding, "keep_up_with_kueue", lambda decision, _case: decision)

    def node_shutdowns_are_not_known(self) -> None:
        left = tuple(clue for clue in evidence.CLUES if clue is not evidence._node_made_room)
        self.plant.setattr(evidence, "CLUES", left)

    def the_end_is_not_the_end(self) -> None:
        self._policies(stays_finished)

    def nobody_looks_after_the_backoff(self) -> None:
        def sleeps(case: Case) -> Any:
            found = backs_off(case)
            return found and replace(found, again_seconds=None)

        self._policies(backs_off, sleeps)

    def lost_nodes_are_waited_for(self) -> None:
        self.plant.setattr(SeenPod, "lost", lambda _pod, _now: False)

    def deleted_jobs_are_remembered(self) -> None:
        self.plant.setattr(Knowledge, "forget", lambda _knowledge, _uid: None)

    def an_old_spec_is_observed(self) -> None:
        accept = attempt_runs.accepted
        old = lambda case: accept(case).model_copy(update={"observed_generation": 1})  # noqa: E731
        self.plant.setattr(attempt_runs, "accepted", old)

    def deadlines_are_overlooked(self) -> None:
        self._policies(limit_is_reached)

    def preflights_are_left_out(self) -> None:
        self._policies(preflight_first)

    def pods_have_no_owner(self) -> None:
        build = pod.build

        def orphan(*args: Any, **more: Any) -> Any:
            made = build(*args, **more)
            made["metadata"]["ownerReferences"][0]["controller"] = False
            return made

        self.plant.setattr(pod, "build", orphan)

    def capacity_is_forgotten(self) -> None:
        current = attempt_starts.current
        forgets = lambda case, status: replace(current(case, status), capacity="OnDemand")  # noqa: E731
        self.plant.setattr(attempt_starts, "current", forgets)

    def every_wait_is_kept(self) -> None:
        self.plant.setattr(attempt_ended, "without_earlier_waits", lambda status: status)

    def moves_are_counted(self) -> None:
        judge = attempt_ended.judge

        def counting(*args: Any) -> Any:
            verdict = judge(*args)
            return replace(verdict, counted={"preemptions": 1}) if verdict.cause == Cause.NO_CAPACITY else verdict

        self.plant.setattr(attempt_ended, "judge", counting)

    def preflights_are_judged_twice(self) -> None:
        """Their number does not change with what was counted, so that the same pod is looked at again."""
        self.plant.setattr(preflight, "tries", lambda _status: 0)

    def preflights_are_repeated(self) -> None:
        def again(case: Case) -> Any:
            found = backs_off(case)
            one_more = preflight.preflight.build(case.job, case.spec, case.profile, number=7, trainer_image="t")
            return found and replace(found, create=(one_more,))

        self._policies(backs_off, again)

    def finished_jobs_go_at_once(self) -> None:
        self.plant.setattr(ttl, "_ttl", lambda _case: 0)

    def pods_are_made_after_the_end(self) -> None:
        def anew(case: Case) -> Any:
            found = has_outlived_itself(case)
            return found and replace(found, create=attempt_starts.pods(case, case.status))

        self._policies(has_outlived_itself, anew)

    def why_it_was_stopped_is_forgotten(self) -> None:
        close = stopping.close
        self.plant.setattr(stopping, "close", lambda case, **_more: close(case))

    def jobs_that_are_gone_get_pods(self) -> None:
        look = Reconciler.reconcile

        async def revives(operator: Any, uid: str) -> Any:
            if operator.knowledge.jobs.get(uid) is None and operator.cluster.pods:
                made = copy.deepcopy(next(iter(operator.cluster.pods.values())))
                made["metadata"]["name"] = f"cats-1-{len(operator.cluster.created)}"
                await operator.cluster.create_pod(made)
            return await look(operator, uid)

        self.plant.setattr(Reconciler, "reconcile", revives)

    def each_pod_has_its_own_group(self) -> None:
        def alone(pods: Any, labels: Any, *, workload: str) -> Any:
            named = ((made, f"{workload}-{made['metadata']['name']}") for made in pods)
            return tuple(pod_group._joined(made, labels, workload=name, total=len(pods)) for made, name in named)

        self.plant.setattr(pod_group, "join", alone)


Story = Callable[[World], None]


def check(world: World) -> None:
    """Hold the world to its promises, as the state machine does after each rule."""
    for promise in world.invariants:
        promise.function(world)


def tell(story: Story, kind: type[World]) -> None:
    world = kind()
    story(world)
    world.teardown()


def pods_run(world: World) -> None:
    for _ in range(2):
        world.look()
        world.everything_is_read_again()
        for name in world.pods("Pending"):
            world.run(name, "n1")
        world.everything_is_read_again()
        check(world)


def started(world: World) -> None:
    pods_run(world)
    world.look()
    check(world)


def followed(world: World) -> None:
    world.everything_is_read_again()
    world.look()
    check(world)
    world.look()
    check(world)


def ends(how: str) -> Story:
    def story(world: World) -> None:
        started(world)
        world.end(FIRST, how)
        followed(world)

    return story


def operator_dies_before_the_pod(world: World) -> None:
    world.cluster.fail_at = (2, "before")
    world.look()
    world.cluster.fail_at = None
    followed(world)


def time_goes_by(world: World) -> None:
    started(world)
    world.time_passes(seconds=400)
    followed(world)


def node_is_lost(world: World) -> None:
    started(world)
    world.a_node_changes(name="n1", taint=LOST, heard=True)
    world.time_passes(seconds=400)
    followed(world)


def spec_changes(world: World) -> None:
    world.the_user_edits(limit=2, valid=True)
    started(world)


def user_deletes(world: World) -> None:
    started(world)
    assert isinstance(world, DeletionWorld)
    world.the_user_deletes_it(heard=True)
    followed(world)


def it_takes_too_long(world: World) -> None:
    started(world)
    assert isinstance(world, LimitedWorld)
    world.it_is_long_after(seconds=3000)
    world.end(FIRST, "yielded")
    followed(world)


def no_room(world: World) -> None:
    world.look()
    assert isinstance(world, ChoicesWorld)
    world.there_is_no_room_for_long(rounds=4, why="Insufficient nvidia.com/gpu")
    check(world)


def a_queued_job_fails(world: World) -> None:
    assert isinstance(world, QueuedWorld)
    world.admitted_pods_run_and_end(evicted=True)
    followed(world)
    world.kueue_admits()
    for name in world.pods("Pending"):
        world.run(name, "n1")
        world.end(name, "bad config")
    followed(world)


def preflight_ends(how: str) -> Story:
    def story(world: World) -> None:
        pods_run(world)
        world.end("cats-preflight", how)
        followed(world)
        world.time_passes(seconds=400)
        followed(world)

    return story


def preflight_passes(world: World) -> None:
    pods_run(world)
    world.end("cats-preflight", "done")
    followed(world)
    started(world)
    world.end(FIRST, "crash")
    followed(world)


def it_is_over(world: World) -> None:
    started(world)
    world.end(FIRST, "done")
    followed(world)
    world.excused.add(FIRST)  # another promise is that no name is used twice
    world.vanish(FIRST, seen=True)
    followed(world)


def it_waits_too_long(world: World) -> None:
    followed(world)
    assert isinstance(world, LimitedWorld)
    world.it_is_long_after(seconds=700)
    followed(world)
    followed(world)


FOUND: list[tuple[Callable[[Bugs], None], type[World], Story, str]] = [
    (Bugs.running_pods_are_taken_for_dead, World, time_goes_by, "two attempts at once"),
    (Bugs.numbers_are_used_again, World, ends("yielded"), "a number was used twice"),
    (Bugs.what_is_missing_counts_as_lost, World, operator_dies_before_the_pod, "nothing was started"),
    (Bugs.preemption_uses_up_the_budget, World, ends("kubelet"), "charged for what is no failure"),
    (Bugs.node_shutdowns_are_not_known, World, ends("node shuts down"), "not the true cause"),
    (Bugs.the_end_is_not_the_end, World, ends("done"), "what was final has changed"),
    (Bugs.nobody_looks_after_the_backoff, World, ends("crash"), "nothing would ever happen again"),
    (Bugs.lost_nodes_are_waited_for, World, node_is_lost, "does not settle"),
    (Bugs.deleted_jobs_are_remembered, DeletionWorld, user_deletes, "remembered of a job that is gone"),
    (Bugs.jobs_that_are_gone_get_pods, DeletionWorld, user_deletes, "a pod for a job that is gone"),
    (Bugs.pods_have_no_owner, DeletionWorld, started, "nobody collects"),
    (Bugs.an_old_spec_is_observed, World, spec_changes, "an older spec was observed"),
    (Bugs.deadlines_are_overlooked, LimitedWorld, it_takes_too_long, "started beyond the deadline"),
    (Bugs.capacity_is_forgotten, ChoicesWorld, started, "another choice than its attempt"),
    (Bugs.every_wait_is_kept, ChoicesWorld, no_room, "push out what the job has been through"),
    (Bugs.moves_are_counted, ChoicesWorld, no_room, "counts as a preemption"),
    (Bugs.places_are_never_given_back, QueuedWorld, a_queued_job_fails, "quota is held for ever"),
    (Bugs.preemption_uses_up_the_budget, PreflightWorld, preflight_ends("yielded"), "did not crash"),
    (Bugs.preflights_are_judged_twice, PreflightWorld, preflight_ends("storage"), "judged twice"),
    (Bugs.preflights_are_repeated, PreflightWorld, preflight_passes, "a preflight after an attempt"),
    (Bugs.finished_jobs_go_at_once, LimitedWorld, it_is_over, "deleted before its time"),
    (Bugs.pods_are_made_after_the_end, LimitedWorld, it_is_over, "made anew after the end"),
    (Bugs.why_it_was_stopped_is_forgotten, LimitedWorld, it_waits_too_long, "stopped by the operator"),
    (Bugs.each_pod_has_its_own_group, QueuedWorld, a_queued_job_fails, "in several groups"),
    (Bugs.preflights_are_left_out, PreflightWorld, started, "before its preflight had passed"),
]
NAMES = [f"{bug.__name__}-{world.__name__}" for bug, world, *_ in FOUND]


@pytest.mark.parametrize(("bug", "world", "story", "promise"), FOUND, ids=NAMES)
def test_a_planted_bug_is_seen(
    bug: Callable[[Bugs], None], world: type[World], story: Story, promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(story, world)  # negative control: it is the bug that is seen
    bug(Bugs(monkeypatch))
    with pytest.raises(AssertionError, match=promise):
        tell(story, world)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("bug", "world"), [(bug, world) for bug, world, *_ in FOUND], ids=NAMES)
def test_chance_finds_it_too(bug: Callable[[Bugs], None], world: type[World], monkeypatch: pytest.MonkeyPatch) -> None:
    bug(Bugs(monkeypatch))
    chance = settings(
        max_examples=2000,
        stateful_step_count=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(world, settings=chance)
