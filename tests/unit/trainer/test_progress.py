"""The board, the server and the metrics."""

import json
import socket
import threading
import urllib.error
import urllib.request

import pytest

from diffusion_api.run import ProgressReport
from diffusion_trainer.curves import Curves, Evaluation, Point, Scored
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.progress import Board, ProgressServer, timestamp
from diffusion_trainer.reporting import Extent, Reporter, slow_data


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def served():
    board, metrics = Board(attempt=2, clock=lambda: 0.0), Metrics()
    server = ProgressServer(0, board=board, metrics=metrics.text)
    yield board, metrics, f"http://127.0.0.1:{server.server_port}"
    server.server_close()


def _get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_timestamps_are_rfc_3339_in_utc():
    assert timestamp(1_767_225_600.9) == "2026-01-01T00:00:00Z"


def test_progress_is_a_valid_report_before_the_first_step(served):
    board, _, url = served
    board.say("encoding images 120/400")
    kind, body = _get(url + "/progress")
    assert kind == "application/json"
    report = ProgressReport.model_validate_json(body)
    assert (report.attempt, report.stage, report.detail) == (2, "Preparing", "encoding images 120/400")
    assert report.time == "1970-01-01T00:00:00Z"
    assert "resumedFromStep" not in json.loads(body)


def test_metrics_are_served_in_the_exposition_format(served):
    _, metrics, url = served
    metrics.step.set(7)
    metrics.checkpoints.labels("acknowledged").inc()
    kind, body = _get(url + "/metrics")
    assert kind.startswith("text/plain; version=0.0.4")
    assert "diffusion_trainer_step 7.0" in body
    assert 'diffusion_trainer_checkpoints_total{result="acknowledged"} 1.0' in body
    assert 'diffusion_trainer_checkpoints_total{result="skipped"} 0.0' in body
    for name in (
        "total_steps", "loss", "learning_rate", "grad_norm", "samples_total", "step_duration_seconds_count",
        "data_wait_seconds_total", "last_checkpoint_timestamp_seconds", "nonfinite_loss_total", "validation_loss",
    ):  # fmt: skip
        assert f"\ndiffusion_trainer_{name} " in body, name
    assert "# TYPE diffusion_trainer_checkpoint_duration_seconds histogram" in body


def test_health_and_unknown_pages(served):
    _, _, url = served
    assert _get(url + "/healthz")[1] == "ok\n"
    with pytest.raises(urllib.error.HTTPError) as caught:
        _get(url + "/secrets")
    with caught.value as error:
        assert error.code == 404


def test_a_reader_that_does_not_read_holds_nobody_up(served):
    board, _, url = served
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as idle:
        idle.sendall(b"GET /progress HTTP/1.0\r\n")  # and never the end of it
        for step in range(1000):
            board.update(step=step)
        assert _get(url + "/healthz")[1] == "ok\n"


def test_warnings_are_bounded_and_said_once():
    board = Board(attempt=1)
    for number in [*range(12), 11]:
        board.warn(f"warning {number} " + "x" * 500)
    assert [text.split()[1] for text in board.report().warnings] == [str(n) for n in range(4, 12)]
    board.say("d" * 1000)
    assert len(board.report().detail) == 256


def test_a_report_says_for_how_long_there_was_no_sign_of_life():
    now = 100.0
    board = Board(attempt=1, monotonic=lambda: now)
    now = 160.0
    board.warn("no sign of life")
    assert board.report().idle_seconds == 60
    board.update()
    assert board.report().idle_seconds == 0


def test_updates_of_several_threads_are_not_lost():
    board = Board(attempt=1)
    threads = [threading.Thread(target=lambda n=n: board.warn(f"from {n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(board.state.warnings) == 8


# --- the reporter ---


def _reporter(*, total=100, start=0):
    clock, board, metrics = Clock(), Board(attempt=1, clock=lambda: 0.0), Metrics()
    extent = Extent(total_steps=total, steps_per_epoch=10, batch_size=4)
    return clock, board, metrics, Reporter(board, metrics, extent=extent, start_step=start, monotonic=clock)


def _points(first, last):
    return [Point(step, loss=float(step), learning_rate=1e-4, grad_norm=0.5) for step in range(first, last + 1)]


def test_reports_are_due_by_steps_and_by_time():
    clock, _, _, reporter = _reporter()
    assert reporter.due(1)
    assert not reporter.due(10)  # ten steps, but no second has passed
    clock.now = 1.0
    assert reporter.due(10)
    assert not reporter.due(9)
    clock.now = 10.0
    assert reporter.due(2)
    assert _reporter(total=3)[3].due(3)  # the end is always reported
    assert _reporter(start=7)[3].due(8)  # and that it moves at all


def test_a_report_averages_since_the_last_one():
    clock, board, metrics, reporter = _reporter(start=20)
    curves = Curves(points=_points(1, 30), evaluations=[Evaluation(20, 0.7)], scores=[Scored(20, 21.5, None)])
    for step in range(21, 31):
        clock.now += 0.5
        reporter.stepped(step, wait_seconds=0.25, now=123.0)
    reporter.report(30, curves)
    progress = board.state.progress
    assert (progress.step, progress.total_steps, progress.epoch, progress.percentage) == (30, 100, 3, 30)
    assert progress.loss == sum(range(21, 31)) / 10
    assert progress.samples_per_second == 8.0  # 10 steps of 4 images in 5 seconds
    assert progress.estimated_remaining_seconds == 35  # 70 steps of half a second
    assert progress.validation_loss == 0.7
    assert (progress.clip_score, progress.kid) == (21.5, None)
    curves.points += _points(31, 31)
    reporter.stepped(31, wait_seconds=0, now=124.0)
    reporter.report(31, curves)
    assert board.state.progress.loss == 31.0
    text = metrics.text().decode()
    assert "diffusion_trainer_validation_loss 0.7" in text
    assert "diffusion_trainer_clip_score 21.5" in text
    assert "diffusion_trainer_kid 0.0" in text
    assert "diffusion_trainer_samples_total 44.0" in text
    assert "diffusion_trainer_step_duration_seconds_count 11.0" in text
    assert "diffusion_trainer_data_wait_seconds_total 2.5" in text
    assert "diffusion_trainer_last_step_timestamp_seconds 124.0" in text


@pytest.mark.parametrize(
    ("steps", "seconds", "waited", "said"),
    [
        (19, 600.0, 600.0, None),  # a few long steps: one of them may have met a disk that was asleep
        (10_000, 59.9, 59.9, None),  # many short ones
        (20, 60.0, 0.0, ""),
        (20, 60.0, 1.2, ""),  # 2 % is what the rule allows
        (20, 60.0, 1.21, "waited for data 2% of the time"),
        (500, 100.0, 92.0, "the last 500 steps waited for data 92% of the time"),
    ],
)
def test_when_steps_wait_for_data_too_long(steps, seconds, waited, said):
    found = slow_data(step=700, steps=steps, seconds=seconds, waited=waited)
    if not said:
        assert found == said
        return
    assert said in found
    assert found.startswith("step 700: ")
    for remedy in ("perGpu.cpu", "DIFFUSION_LOADER_WORKERS", "faster disk"):
        assert remedy in found
    assert len(found) <= 256, "the board would cut it"


def test_waiting_for_data_is_told_once_and_judged_by_windows():
    """Ten minutes without waiting do not hide that each step of the eleventh waits, nor is each minute told of."""
    clock, board, _, reporter = _reporter(total=2000)
    for step in range(1, 601):
        clock.now += 1.0
        reporter.stepped(step, wait_seconds=0.001, now=0.0)
    assert board.state.warnings == ()
    for step in range(601, 901):
        clock.now += 1.0
        reporter.stepped(step, wait_seconds=0.05, now=0.0)
    (told,) = board.state.warnings
    assert told.startswith("step 660: the last 60 steps waited for data 5% of the time")
