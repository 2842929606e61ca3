"""Budgets: what follows from the end of an attempt, and when it is enough."""

from typing import Any

import pytest

from diffusion_api.job import JobSpec
from diffusion_api.outcomes import INFRASTRUCTURE_BUDGET, RETUNE_BUDGET, SHORT_OF_ROOM, Action, Cause
from diffusion_api.run import LastWord
from diffusion_api.status import Attempt, CheckpointStatus, Counters, JobStatus
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.policies.run_policy import Verdict, backoff_seconds, jittered, judge
from diffusion_operator.state import Job
from diffusion_operator.status import count
from testkit.builders import at, make_checkpoint, make_job


def spec(**changes: Any) -> JobSpec:
    found = Job.read(make_job(**changes)).spec
    assert found is not None
    return found


def status(*earlier: Attempt, counters: Counters | None = None, **attempt: Any) -> JobStatus:
    newest = Attempt(number=len(earlier) + 1, started_at=at(-100), **attempt)
    return JobStatus(attempt=newest.number, attempts=(newest, *earlier), counters=counters or Counters())


def earlier(cause: Cause, **attempt: Any) -> Attempt:
    return Attempt(number=1, started_at=at(-900), ended_at=at(-800), cause=str(cause), **attempt)


def ending(cause: Cause, *, step: int | None = None, exit_code: int = 1) -> Ending:
    word = LastWord(attempt=1, exit_code=exit_code, message="m", step=step) if step is not None else None
    return Ending(cause=cause, message="what happened", exit_code=exit_code, word=word)


def test_failures_are_counted_until_the_limit() -> None:
    first = judge(status(), spec(runPolicy={"backoffLimit": 1}), ending(Cause.CRASH))
    counted = {"failures": 1, "failures_since_checkpoint": 1}
    assert (first.action, first.counted, first.wait_seconds) == (Action.BACK_OFF, counted, 10)
    one = status(counters=Counters(failures=1, failures_since_checkpoint=1))
    last = judge(one, spec(runPolicy={"backoffLimit": 1}), ending(Cause.CRASH))
    assert (last.action, last.reason) == (Action.FAIL, "BackoffLimitExceeded")
    assert "backoffLimit is 1" in last.message


@pytest.mark.parametrize(("times", "seconds"), [(1, 10), (2, 20), (3, 40), (6, 300), (100, 300)])
def test_backoff_doubles_up_to_five_minutes(times: int, seconds: float) -> None:
    assert backoff_seconds(times) == seconds


class TestRepeatedCrash:
    def crash(self, before: Attempt, *, step: int | None = 700, exit_code: int = 1) -> Verdict:
        return judge(status(before, reached_step=step), spec(), ending(Cause.CRASH, step=step, exit_code=exit_code))

    def test_the_same_crash_at_the_same_step_twice_is_final(self) -> None:
        verdict = self.crash(earlier(Cause.CRASH, exit_code=1, reached_step=700))
        assert (verdict.action, verdict.cause) == (Action.FAIL, Cause.REPEATED_CRASH)
        assert "step 700" in verdict.message

    def test_also_with_a_preemption_in_between(self) -> None:
        between = earlier(Cause.PREEMPTED, reached_step=650)
        crashed = earlier(Cause.CRASH, exit_code=1, reached_step=700)
        verdict = judge(status(between, crashed, reached_step=700), spec(), ending(Cause.CRASH, step=700))
        assert verdict.cause == Cause.REPEATED_CRASH

    @pytest.mark.parametrize(
        "before",
        [
            earlier(Cause.CRASH, exit_code=1, reached_step=699),
            earlier(Cause.CRASH, exit_code=139, reached_step=700),
            earlier(Cause.HANG, exit_code=1, reached_step=700),
        ],
    )
    def test_another_step_code_or_cause_is_another_crash(self, before: Attempt) -> None:
        assert self.crash(before).action == Action.BACK_OFF

    def test_without_the_trainers_own_word_nothing_is_known_of_the_step(self) -> None:
        assert self.crash(earlier(Cause.CRASH, exit_code=1), step=None).action == Action.BACK_OFF


@pytest.mark.parametrize("short", SHORT_OF_ROOM)
def test_what_ran_out_is_tried_once_more(short: Cause) -> None:
    assert judge(status(), spec(), ending(short)).action == Action.BACK_OFF
    again = status(earlier(short), counters=Counters(failures_since_checkpoint=1))
    assert judge(again, spec(), ending(short)).action == Action.FAIL


@pytest.mark.parametrize(("steps", "fails"), [((7, 7), True), ((7, 8), False), ((7,), False), ((None, None), False)])
def test_the_third_hang_at_one_step_is_the_last(steps: tuple[int | None, ...], fails: bool) -> None:
    before = [earlier(Cause.HANG, reached_step=step) for step in steps]
    newest = status(*before, counters=Counters(infrastructure=len(before)), reached_step=steps[0])
    verdict = judge(newest, spec(), ending(Cause.HANG))
    assert (verdict.action == Action.FAIL) == fails
    assert ("3 times at step 7" in verdict.message) == fails


def test_host_memory_that_ran_out_before_a_checkpoint_is_forgotten() -> None:
    before = [earlier(Cause.PREEMPTED), earlier(Cause.HOST_OUT_OF_MEMORY)]
    counters = Counters(failures=1, failures_since_checkpoint=1)
    stuck = status(*before, counters=counters, resumed_from_step=700)
    checkpoint = CheckpointStatus(latest=make_checkpoint(700))
    stuck = stuck.model_copy(update={"checkpoint": checkpoint})
    assert judge(stuck, spec(), ending(Cause.HOST_OUT_OF_MEMORY)).action == Action.FAIL
    moved = status(*before, counters=counters, resumed_from_step=600).model_copy(update={"checkpoint": checkpoint})
    assert judge(moved, spec(), ending(Cause.HOST_OUT_OF_MEMORY)).action == Action.BACK_OFF
    long_ago = status(*before, counters=Counters(failures=1))
    assert judge(long_ago, spec(), ending(Cause.HOST_OUT_OF_MEMORY)).action == Action.BACK_OFF


class TestInfrastructure:
    def test_it_has_a_budget_of_its_own(self) -> None:
        limit = spec(runPolicy={"backoffLimit": 0})
        nearly = status(counters=Counters(infrastructure=INFRASTRUCTURE_BUDGET - 1))
        assert judge(nearly, limit, ending(Cause.HANG)).action == Action.BACK_OFF
        spent = status(counters=Counters(infrastructure=INFRASTRUCTURE_BUDGET))
        assert judge(spent, limit, ending(Cause.HANG)).action == Action.FAIL

    @pytest.mark.parametrize(
        ("resumed", "step", "time", "saved"),
        [(600, 700, 0, True), (700, 700, 0, False), (None, 700, -50, True), (None, 700, -150, False)],
    )
    def test_a_new_checkpoint_gives_the_budget_back(
        self, resumed: int | None, step: int, time: float, saved: bool
    ) -> None:
        spent = status(counters=Counters(infrastructure=INFRASTRUCTURE_BUDGET), resumed_from_step=resumed)
        checkpoint = CheckpointStatus(latest=make_checkpoint(step, time=at(time)))
        verdict = judge(spent.model_copy(update={"checkpoint": checkpoint}), spec(), ending(Cause.HANG))
        assert (verdict.action == Action.BACK_OFF) == saved
        assert verdict.counted["infrastructure"] == (1 - INFRASTRUCTURE_BUDGET if saved else 1)


class TestProgressGivesTheBudgetBack:
    """reference: budgets are reset when an attempt has committed a new checkpoint; what happened stays visible."""

    @staticmethod
    def spent(*, saved: bool) -> JobStatus:
        counters = Counters(failures=7, failures_since_checkpoint=3, infrastructure=4)
        checkpoint = CheckpointStatus(latest=make_checkpoint(700 if saved else 600))
        return status(counters=counters, resumed_from_step=600).model_copy(update={"checkpoint": checkpoint})

    def test_of_failures(self) -> None:
        policy = spec(runPolicy={"backoffLimit": 3})
        assert judge(self.spent(saved=False), policy, ending(Cause.CRASH)).action == Action.FAIL
        verdict = judge(self.spent(saved=True), policy, ending(Cause.CRASH))
        assert (verdict.action, verdict.wait_seconds) == (Action.BACK_OFF, 10)
        after = count(self.spent(saved=True), **verdict.counted).counters
        assert (after.failures, after.failures_since_checkpoint, after.infrastructure) == (8, 1, 0)

    @pytest.mark.parametrize(("saved", "left"), [(True, (0, 0)), (False, (3, 4))])
    def test_by_an_attempt_that_ended_for_another_reason(self, saved: bool, left: tuple[int, int]) -> None:
        before = self.spent(saved=saved)
        after = count(before, **judge(before, spec(), ending(Cause.PREEMPTED)).counted).counters
        assert (after.failures_since_checkpoint, after.infrastructure) == left
        assert (after.failures, after.preemptions) == (7, 1)


class TestRetune:
    def test_it_is_immediate_and_not_a_failure(self) -> None:
        verdict = judge(status(), spec(runPolicy={"backoffLimit": 0}), ending(Cause.CUDA_OUT_OF_MEMORY))
        assert (verdict.action, verdict.counted) == (Action.RESUME, {"out_of_memory_retunes": 1})

    @pytest.mark.parametrize(
        ("training", "resources", "bounds"),
        [
            ({"batchSize": 16, "microBatchSize": 8}, {}, [4, 2, 1]),
            ({"batchSize": 16}, {}, [8, 4, 2, 1]),
            ({"batchSize": 6, "microBatchSize": 6}, {}, [3, 1]),
            ({"batchSize": 16}, {"nodes": 2, "gpusPerNode": 2}, [2, 1]),
        ],
    )
    def test_each_halves_the_bound(
        self, training: dict[str, int], resources: dict[str, int], bounds: list[int]
    ) -> None:
        asked, found = spec(training=training, resources=resources), []
        now = status()
        while (verdict := judge(now, asked, ending(Cause.CUDA_OUT_OF_MEMORY))).action == Action.RESUME:
            found.append(verdict.micro_batch_size)
            now = now.model_copy(update={"micro_batch_size": verdict.micro_batch_size})
        assert found == bounds

    @pytest.mark.parametrize(
        ("said", "known", "bound"), [(6, None, 3), (6, 4, 2), (2, 4, 1), (None, 4, 2), (64, None, 8)]
    )
    def test_the_trainers_own_word_counts(self, said: int | None, known: int | None, bound: int) -> None:
        """Where Auto had found 6 to fit, half of the batch of 16 would be more than what has just failed."""
        word = LastWord(attempt=1, exit_code=80, message="m", micro_batch_size=said)
        out = Ending(cause=Cause.CUDA_OUT_OF_MEMORY, message="m", exit_code=80, word=word)
        before = status().model_copy(update={"micro_batch_size": known})
        assert judge(before, spec(training={"batchSize": 16}), out).micro_batch_size == bound

    @pytest.mark.parametrize(
        ("training", "retunes", "known"),
        [
            ({"batchSize": 1}, 0, None),
            ({"batchSize": 8, "microBatchSize": 8}, 3, 1),
            ({"batchSize": 4096}, RETUNE_BUDGET, 256),
        ],
    )
    def test_at_the_smallest_or_out_of_budget_it_fails_with_a_remedy(
        self, training: dict[str, int], retunes: int, known: int | None
    ) -> None:
        before = status(counters=Counters(out_of_memory_retunes=retunes)).model_copy(update={"micro_batch_size": known})
        verdict = judge(before, spec(training=training), ending(Cause.CUDA_OUT_OF_MEMORY))
        assert (verdict.action, verdict.reason) == (Action.FAIL, "CudaOutOfMemory")
        assert "lower dataset.resolution" in verdict.message


def test_preemptions_are_counted_and_free() -> None:
    spent = status(counters=Counters(preemptions=1000, failures=3))
    verdict = judge(spent, spec(), ending(Cause.PREEMPTED))
    assert (verdict.action, verdict.counted, verdict.wait_seconds) == (Action.RESUME, {"preemptions": 1}, 0)


class TestJitter:
    def test_it_is_a_function_of_the_attempt(self) -> None:
        assert jittered(10, key="a/1") == jittered(10, key="a/1")
        assert jittered(0, key="a/1") == 0

    def test_a_thousand_jobs_that_failed_together_do_not_come_back_together(self) -> None:
        waits = [jittered(300, key=f"{number}/1") for number in range(1000)]
        assert 300 <= min(waits) < 305
        assert 445 < max(waits) <= 450
        assert max(waits.count(second) for second in set(waits)) < 30, "about 7 in any second"
