"""The status as a value: conditions, strings for people, calm, and its size."""

from datetime import timedelta

import pytest

from diffusion_api.status import MAX_ATTEMPTS, Attempt, JobStatus
from diffusion_operator.status import (
    MAX_BYTES,
    add_attempt,
    calm,
    duration,
    set_condition,
    set_pending,
    shown,
    size,
    take_report,
    to_object,
)
from testkit.builders import NOW, at, make_checkpoint, make_progress, make_report


def heard(step: int, *, time: float = 0, checkpoint: int | None = None) -> JobStatus:
    latest = make_checkpoint(checkpoint) if checkpoint is not None else None
    report = make_report(step, progress=make_progress(step, time=at(time)), latest_checkpoint=latest)
    status = JobStatus(phase="Running", attempt=1, attempts=(Attempt(number=1, started_at=at(-60)),))
    return take_report(status, report).model_copy(update={"message": f"step {step}"})


def test_a_conditions_time_moves_only_with_its_value() -> None:
    def say(status: JobStatus, value: str, *, seconds: float) -> JobStatus:
        now = NOW + timedelta(seconds=seconds)
        message = f"said at {seconds}"
        return set_condition(status, "PodsReady", value, reason="R", message=message, generation=3, now=now)  # type: ignore[arg-type]

    status = say(say(JobStatus(), "False", seconds=0), "False", seconds=10)
    assert (status.conditions[0].last_transition_time, status.conditions[0].message) == (at(0), "said at 10")
    status = say(status, "True", seconds=20)
    assert (status.conditions[0].last_transition_time, len(status.conditions)) == (at(20), 1)


def test_pending_keeps_its_since_while_the_cause_lasts() -> None:
    status = set_pending(JobStatus(), cause="InsufficientGPU", detail="0/3", hint="", now=NOW)
    later = set_pending(status, cause="InsufficientGPU", detail="0/4", hint="", now=NOW + timedelta(seconds=60))
    assert later.pending is not None
    assert (later.pending.since, later.pending.detail) == (at(0), "0/4")
    other = set_pending(later, cause="MissingSecret", detail="", hint="", now=NOW + timedelta(seconds=90))
    assert other.pending is not None
    assert other.pending.since == at(90)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59, "59s"),
        (60, "1m"),
        (2460, "41m"),
        (3600, "1h"),
        (11520, "3h12m"),
        (86400, "1d"),
        (187200, "2d4h"),
    ],
)
def test_durations_read_like_kubectls_ages(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_percentage_is_never_rounded_up_to_done() -> None:
    assert shown(make_progress(1999)).done == "99%"
    assert shown(make_progress(2000)).done == "100%"
    assert shown(make_progress(0, total=0)).done == "0%"


class TestCalm:
    def test_progress_alone_is_written_every_15_seconds(self) -> None:
        old = heard(100)
        assert calm(heard(110, time=14), old, least_seconds=15) is old
        assert calm(heard(110, time=15), old, least_seconds=15).message == "step 110"

    def test_a_new_checkpoint_or_phase_is_written_at_once(self) -> None:
        old = heard(100)
        assert calm(heard(101, time=1, checkpoint=100), old, least_seconds=15).checkpoint is not None
        exporting = heard(101, time=1).model_copy(update={"phase": "Complete"})
        assert calm(exporting, old, least_seconds=15).phase == "Complete"

    def test_a_trainers_clock_that_went_back_is_believed(self) -> None:
        assert calm(heard(110, time=-3600), heard(100), least_seconds=15).message == "step 110"


def test_a_checkpoint_is_not_forgotten_by_a_report_without_one() -> None:
    status = take_report(heard(100, checkpoint=90), make_report(120))
    assert status.checkpoint is not None
    assert status.checkpoint.latest is not None
    assert (status.checkpoint.latest.step, status.checkpoint.at_risk_steps) == (90, 30)


class TestSize:
    def crowded(self, characters: str) -> JobStatus:
        attempts = tuple(
            Attempt(
                number=n,
                started_at=at(),
                ended_at=at(),
                message=characters * 1024,
                last_lines=characters * 1024,
                nodes=("n",),
            )
            for n in range(MAX_ATTEMPTS, 0, -1)
        )
        return JobStatus(message=characters * 1024, attempts=attempts)

    @pytest.mark.parametrize("characters", ["x", "ä", "\n", "🐈"])
    def test_it_stays_under_8_kib_and_the_newest_attempt_is_the_last_to_lose_words(self, characters: str) -> None:
        content = to_object(self.crowded(characters))
        assert size(content) <= MAX_BYTES
        assert content["attempts"][0]["number"] == MAX_ATTEMPTS
        assert content["attempts"][0]["lastLines"]

    def test_many_nodes_do_not_push_out_what_budgets_go_by(self) -> None:
        nodes = tuple(f"gke-gpus-a100-8x-pool-3f2b1c9d-{number:08d}" for number in range(64))
        attempts = tuple(
            Attempt(number=n, started_at=at(), ended_at=at(), cause="Crash", reached_step=n, message="x", nodes=nodes)
            for n in range(MAX_ATTEMPTS, 0, -1)
        )
        content = to_object(JobStatus(attempts=attempts))
        assert size(content) <= MAX_BYTES
        assert [one["reachedStep"] for one in content["attempts"]] == list(range(MAX_ATTEMPTS, 0, -1))
        assert content["attempts"][0]["nodes"] == list(nodes)

    def test_what_fits_is_not_touched(self) -> None:
        status = heard(100, checkpoint=90)
        assert JobStatus.model_validate(to_object(status)) == status

    def test_ten_attempts_are_kept_newest_first(self) -> None:
        status = JobStatus()
        for number in range(1, 14):
            status = add_attempt(status, Attempt(number=number, started_at=at()), keep=MAX_ATTEMPTS)
        assert [attempt.number for attempt in status.attempts] == list(range(13, 3, -1))
        assert status.attempt == 13


def test_numbers_for_people_have_four_digits() -> None:
    exact = make_progress(1).model_copy(update={"loss": 0.8398071527481079, "validation_loss": None})
    seen = shown(exact)
    assert (seen.loss, seen.validation_loss) == (0.8398, None)
