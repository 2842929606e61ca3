"""ttlSecondsAfterFinished: the job goes when it is time, and only then, whatever happened to operator and pods."""

import asyncio

import pytest

from diffusion_operator.errors import ConflictError
from testkit.builders import at, last_word, make_job, make_pod
from testkit.deciding import after, ask
from testkit.simulation import Simulation

TTL = 300


def completed(ttl: int | None = TTL, **spec: object) -> Simulation:
    """Return the world when the job has just been completed, before anybody saw it."""
    world = Simulation(make_job(runPolicy={"ttlSecondsAfterFinished": ttl}, **spec))
    world.settle()
    world.run_pod("cats-1-0")
    world.settle()
    world.seconds = 100
    world.end_pod("cats-1-0", 0, message=last_word(0))
    return world


@pytest.mark.parametrize("kind", ["Complete", "Failed"])
@pytest.mark.parametrize(("seconds", "left"), [(0, 300), (299, 1), (300, None), (301, None), (1e6, None)])
def test_the_boundary(kind: str, seconds: float, left: float | None) -> None:
    done = {"type": kind, "status": "True", "reason": "x", "message": "", "lastTransitionTime": at()}
    job = make_job(runPolicy={"ttlSecondsAfterFinished": TTL}, status={"attempt": 1, "conditions": [done]})
    decision = ask(job, seconds=seconds)
    assert (decision.rule, decision.delete_job, decision.again_seconds) == ("ttl", left is None, left)
    assert (decision.status, decision.create) == (None, ())


def test_until_then_it_is_tidied_up_as_ever() -> None:
    done = {"type": "Failed", "status": "True", "reason": "x", "message": "", "lastTransitionTime": at()}
    job = make_job(runPolicy={"ttlSecondsAfterFinished": TTL}, status={"attempt": 2, "conditions": [done]})
    pods = [make_pod(job, attempt=1, phase="Failed", node="n"), make_pod(job, attempt=2, phase="Running", node="n")]
    assert [pod.name for pod in ask(job, *pods).delete] == ["cats-2-0"]


def test_nothing_is_deleted_without_it_or_before_the_end_or_twice() -> None:
    done = {"type": "Complete", "status": "True", "reason": "x", "message": "", "lastTransitionTime": at()}
    assert not ask(make_job(status={"conditions": [done]}), seconds=1e9).delete_job
    policy = {"ttlSecondsAfterFinished": 0}
    running = make_job(runPolicy=policy)
    assert not ask(after(running, ask(running)), make_pod(running, phase="Running", node="n"), seconds=1e9).delete_job
    going = make_job(runPolicy=policy, status={"conditions": [done]}, metadata={"deletionTimestamp": at()})
    assert not ask(going, seconds=1e9).delete_job
    theirs = make_job(runPolicy=policy, status={"conditions": [done]}, managedBy="example.com/other")
    assert not ask(theirs, seconds=1e9).delete_job


def test_a_finished_job_that_this_version_does_not_understand_goes_too() -> None:
    done = {"type": "Complete", "status": "True", "reason": "x", "message": "", "lastTransitionTime": at()}
    job = make_job(runPolicy={"ttlSecondsAfterFinished": TTL}, status={"conditions": [done]}, method="Telepathy")
    assert ask(job, seconds=TTL).delete_job


def test_trainer_1533_the_timer_runs_without_any_further_event() -> None:
    """There the time was only looked at when something else happened to the job."""
    world = completed()
    assert world.settle() == TTL, "the look that ends the job already knows when to come back"
    world.seconds += TTL
    world.settle()
    assert not world.exists


@pytest.mark.parametrize("how", ["failed at its deadline", "suspended", "preflight"])
def test_trainer_1533_whatever_ended_it(how: str) -> None:
    policy = {"ttlSecondsAfterFinished": TTL, "activeDeadlineSeconds": 100}
    world = Simulation(make_job(runPolicy=policy))
    world.settle()
    if how != "preflight":
        world.run_pod("cats-1-0")
        world.settle()
    world.seconds = 99
    if how == "suspended":
        world.cluster.change_spec("team-a", "cats", suspend=True)
        world.settle()
        world.end_pod("cats-1-0", 0, message=last_word(0))
    else:
        world.seconds = 100
        world.settle()
    if how == "failed at its deadline":
        world.end_pod("cats-1-0", 75, message=last_word(75))
    assert world.settle() == TTL
    assert world.status["phase"] in {"Complete", "Failed"}


def test_trainer_2991_and_3779_children_of_a_finished_job_are_never_made_anew() -> None:
    """There the child was deleted when its time was over, taken for missing, and run once more, again and again."""
    world = completed()
    world.settle()
    world.cluster.drop_pod("cats-1-0")
    for seconds in (10, TTL - 1, TTL):
        world.seconds = 100 + seconds
        world.settle()
    assert not world.exists
    assert world.cluster.created == ["cats-1-0"]


def test_trainer_3737_a_restart_neither_prolongs_the_time_nor_begins_the_work_again() -> None:
    """There a new controller found no child, started from the first attempt, and gave all budgets back."""
    world = completed()
    world.settle()
    world.cluster.drop_pod("cats-1-0")
    for _ in range(3):
        world.seconds += 90
        world.restart()
        assert world.settle() == TTL - (world.seconds - 100)
    world.seconds = 100 + TTL
    world.restart()
    world.settle()
    assert (world.exists, world.cluster.created) == (False, ["cats-1-0"])


def test_a_job_that_changed_since_it_was_read_is_not_deleted() -> None:
    """The user has just given it more time."""
    world = completed()
    world.settle()
    world.seconds += TTL
    world.cluster.change_spec("team-a", "cats", runPolicy={"ttlSecondsAfterFinished": 10 * TTL})
    with pytest.raises(ConflictError):
        asyncio.run(world.reconciler.reconcile(world.uid))
    assert world.exists
    assert world.settle() == 9 * TTL


def test_another_job_of_the_same_name_is_not_deleted() -> None:
    world = completed()
    world.settle()
    world.seconds += TTL
    del world.cluster.jobs["team-a", "cats"]
    world.cluster.add_job(make_job(uid="1f9c3a52-6a1e-4a4e-9d0e-5c1f2b3a4d5e"))
    with pytest.raises(ConflictError):
        asyncio.run(world.reconciler.reconcile(world.uid))
    assert world.exists
