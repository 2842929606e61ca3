"""Steps without numbers in a row: when they are too many, and what follows."""

import pytest
import torch

from diffusion_api.training import NonFinite
from diffusion_trainer.guard import Guard, Streak


def _seen(pattern, *, limit, lag=2):
    """Return (step, streak) of every answer to a pattern of steps, `x` being a broken one."""
    guard, found = Guard(NonFinite(limit=limit), "cpu"), []
    for step, mark in enumerate(pattern, start=1):
        guard.note(step, torch.tensor(mark == "x"))
        if streak := guard.streak(lag=lag):
            found.append((step, streak))
    return found


@pytest.mark.parametrize(
    ("pattern", "limit", "found"),
    [
        ("..xx.x..", 3, []),
        ("..xxx...", 3, [(7, Streak(5, 3))]),  # two steps later, when the count has come
        ("x.....", 1, [(3, Streak(1, 1))]),
        ("xxx", 3, []),  # not yet
    ],
)
def test_a_streak_is_found_a_few_steps_later(pattern, limit, found):
    assert _seen(pattern, limit=limit) == found


def test_at_the_end_nothing_is_left_unseen():
    assert _seen("xxx", limit=3, lag=0) == [(3, Streak(3, 3))]


def test_it_is_calm_between_streaks():
    guard = Guard(NonFinite(), "cpu")
    assert guard.calm
    guard.note(1, torch.tensor(True))
    assert not guard.calm
    guard.note(2, torch.tensor(False))
    assert guard.calm


def test_going_back_halves_the_learning_rate_three_times_at_most():
    guard = Guard(NonFinite(policy="RollBack", limit=1), "cpu")
    factors = []
    while guard.may_go_back:
        guard.note(1, torch.tensor(True))
        guard.go_back()
        assert guard.calm
        assert guard.streak(lag=0) is None
        factors.append(guard.factor)
    assert factors == [0.5, 0.25, 0.125]
    assert not Guard(NonFinite(policy="Fail"), "cpu").may_go_back
