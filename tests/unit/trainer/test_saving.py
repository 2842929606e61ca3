"""Saving as the loop sees it: what is saved, pinned and announced, and what a busy uploader puts off."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from diffusion_trainer import saving
from diffusion_trainer.cadence import Cadence
from diffusion_trainer.checkpoint import Entry, Saved, Snapshot
from diffusion_trainer.curves import Evaluation
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.progress import Board
from diffusion_trainer.saving import Saver, Voices


@dataclass
class FakePublisher:
    """Remembers what was saved; `busy` and `committing` say how the uploader behaves."""

    busy: bool = False
    committing: bool = True
    saves: list = field(default_factory=list)
    saved: Saved | None = None
    in_flight: Saved | None = None

    def save(self, taken, *, best=None):
        self.saves.append(taken.step)
        entry = Entry(taken.step, 1, f"ckpt/{taken.step}", "sha", 100.0)
        self.in_flight = Saved(entry, stall_seconds=1.0, upload_seconds=2.0, size_bytes=10, best=best)
        if self.committing:
            self.saved = self.in_flight

    def try_save(self, taken):
        if not self.busy:
            self.save(taken)
        return not self.busy

    def flush(self, *, deadline_seconds):  # noqa: ARG002 - the protocol
        if not self.busy:
            self.saved = self.in_flight
        return not self.busy

    def poll(self):
        pass


def _saver(publisher, interval="2steps", start_step=0, best_step=None):
    clock = SimpleNamespace(now=0.0)
    board, metrics = Board(attempt=1), Metrics()
    tensors = {"model": {"a": torch.zeros(1000)}}
    saver = Saver(
        publisher,
        lambda step: Snapshot(step, tensors, {}),
        cadence=Cadence.parse(interval),
        start_step=start_step,
        voices=Voices(board, metrics, "file:///state/"),
        best_step=best_step,
        monotonic=lambda: clock.now,
    )
    return clock, board, metrics, saver


def test_a_step_is_saved_once_and_announced():
    publisher = FakePublisher()
    _, board, metrics, saver = _saver(publisher)
    assert [step for step in range(1, 5) if saver.due(step)] == [2, 4]
    saver.save(2)
    assert not saver.due(2)
    latest = board.state.latest_checkpoint
    assert (latest.step, latest.uri, latest.time) == (2, "file:///state/ckpt/2/", "1970-01-01T00:01:40Z")
    saver.announce()
    assert 'checkpoints_total{result="acknowledged"} 1.0' in metrics.text().decode()


def test_the_step_that_was_resumed_from_is_not_saved_again():
    _, _, _, saver = _saver(FakePublisher(), start_step=2)
    assert not saver.due(2)


def test_the_best_weights_are_saved_at_their_very_step_and_pinned():
    publisher = FakePublisher()
    _, board, _, saver = _saver(publisher)
    assert not saver.keep_best(3, None)
    assert not saver.keep_best(3, Evaluation(2, 0.5))  # the best is another step
    assert saver.keep_best(3, Evaluation(3, 0.5))
    assert not saver.keep_best(3, Evaluation(3, 0.5))
    assert publisher.saves == [3]
    assert (board.state.best_checkpoint.step, board.state.best_checkpoint.value) == (3, 0.5)
    assert board.state.best_checkpoint.metric == "validation_loss"
    saver.save(4)
    assert board.state.latest_checkpoint.step == 4
    assert board.state.best_checkpoint.step == 3
    # A step that was saved before it was evaluated, by an attempt that was stopped then, is pinned later.
    saver.keep_best(4, Evaluation(4, 0.4))
    assert publisher.saves == [3, 4, 4]
    assert board.state.best_checkpoint.step == 4


def test_what_is_pinned_already_is_not_saved_again():
    _, _, _, saver = _saver(FakePublisher(), start_step=3, best_step=3)
    assert not saver.keep_best(3, Evaluation(3, 0.5))


def test_a_busy_uploader_puts_a_timed_save_off():
    publisher = FakePublisher(busy=True)
    clock, board, metrics, saver = _saver(publisher, interval="60s")
    clock.now = 60
    assert saver.due(5)
    saver.save(5)
    assert publisher.saves == []
    assert saver.due(6)
    assert 'checkpoints_total{result="skipped"} 1.0' in metrics.text().decode()
    publisher.busy = False
    saver.save(6)
    assert publisher.saves == [6]
    clock.now = 119
    assert not saver.due(7)
    assert board.state.latest_checkpoint.step == 6


def test_the_end_waits_for_the_acknowledgement():
    publisher = FakePublisher(committing=False)
    _, board, _, saver = _saver(publisher, interval="Auto")
    saver.save(9, wait=True)
    assert publisher.saves == [9]
    assert board.state.latest_checkpoint.step == 9
    saver.save(9, wait=True)
    assert publisher.saves == [9]


def test_a_large_upload_that_is_waited_for_is_no_hang_and_one_that_hangs_is_one(monkeypatch):
    """4,000 bytes at 100 a second: 40 seconds. The uploader answers after 100; it is asked every 5."""
    monkeypatch.setattr(saving, "SLOWEST_BYTES_PER_SECOND", 100)
    publisher = FakePublisher(committing=False)
    clock, board, _, saver = _saver(publisher, interval="Auto")
    beats = []

    def flush(*, deadline_seconds):
        if publisher.in_flight is None:
            return True
        clock.now += deadline_seconds
        return clock.now > 100

    monkeypatch.setattr(publisher, "flush", flush)
    monkeypatch.setattr(board, "update", lambda **changes: beats.append(clock.now) if not changes else None)
    saver.save(9, wait=True)
    assert beats == [5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0]
    assert clock.now == 105


@pytest.mark.parametrize(("seconds", "saves"), [(30.0, [3]), (0.0, [])])
def test_giving_way_saves_what_fits(seconds, saves):
    publisher = FakePublisher()
    _, _, _, saver = _saver(publisher)
    saver.give_way(3, seconds_left=seconds)
    assert publisher.saves == saves


def test_giving_way_leaves_a_busy_uploader_alone():
    publisher = FakePublisher(busy=True)
    _, _, _, saver = _saver(publisher)
    saver.give_way(3, seconds_left=30)
    assert publisher.saves == []
