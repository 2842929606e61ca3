"""When to stop, which weights are best, when images are memorised: closed forms of the curve of evaluations."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from diffusion_api.validation import EarlyStopping
from diffusion_trainer.curves import Evaluation
from diffusion_trainer.overfitting import advantage, best, chance, hint, stops_after, warning

PATIENT = EarlyStopping(patience=2, minDelta=0.01)


def curve(*losses):
    return [Evaluation(10 * (i + 1), loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "stop"),
    [
        ((), None),
        ((1.0,), None),
        ((1.0, 0.9, 0.8, 0.7), None),
        ((1.0, 0.9, 0.95, 0.96), 40),  # two in a row without improvement
        ((1.0, 0.9, 0.95, 0.8, 0.85, 0.84), 60),  # an improvement begins the count anew
        ((1.0, 0.995, 0.992), 30),  # less than 1 % better is not better
        ((1.0, 0.995, 0.989, 0.985), None),  # but small steps add up: 0.989 < 0.99
        ((1.0, 0.9, 0.9, 0.9, 0.1), 40),  # it has stopped before that
        ((math.nan, 1.0, math.nan, 1.0), 40),  # what is no number is no improvement
    ],
)
def test_it_stops_at_the_evaluation_that_exhausts_patience(losses, stop):
    assert stops_after(curve(*losses), PATIENT) == stop


def test_the_rule_is_relative_and_its_default_is_two_thousandths():
    tiny = [replace(one, loss=one.loss / 1e4) for one in curve(1.0, 0.9, 0.95, 0.96)]
    assert stops_after(tiny, PATIENT) == 40
    rule = EarlyStopping()
    assert (rule.patience, rule.min_delta) == (4, 0.002)
    assert stops_after(curve(1.0, 0.9981, 0.9981, 0.9981, 0.9981), rule) == 50
    assert stops_after(curve(1.0, 0.9979, 0.9979, 0.9979, 0.9979), rule) is None


def test_without_a_rule_it_never_stops():
    assert stops_after(curve(*range(1, 100)), None) is None


def test_min_delta_one_and_zero_are_what_they_say():
    assert stops_after(curve(1.0, 1e-9), EarlyStopping(patience=1, minDelta=1)) == 20
    assert stops_after(curve(1.0, 1.0 - 1e-12), EarlyStopping(patience=1, minDelta=0)) is None


def test_every_prefix_decides_the_same_so_a_resume_needs_no_state():
    losses = (1.0, 0.9, 0.95, 0.96, 0.1, 0.1)
    decided = [stops_after(curve(*losses[:n]), PATIENT) for n in range(len(losses) + 1)]
    assert decided == [None, None, None, None, 40, 40, 40]


def test_best_is_the_lowest_and_the_first_of_equals():
    assert best(curve(1.0, 0.5, 0.5, 0.7)).step == 20
    assert best(curve(math.nan, 2.0)).step == 20
    assert best([]) is None
    assert best(curve(1.0, 0.9999)).step == 20  # minDelta decides when to stop, not what is best


def test_the_membership_advantage_is_that_of_the_best_threshold():
    assert advantage([1.0, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]) == 1
    assert advantage([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]) == 0
    assert advantage([0.2, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]) == 0.75  # below 0.4: all, and one of the others
    assert advantage([0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 1.0, 1.0]) == 0  # higher than those of others is no sign
    assert advantage([1.0] * 8, [0.01] + [0.05] * 7) == 1  # most of them above their mean
    assert advantage([math.nan] * 4, [math.nan] * 4) == 0
    assert advantage([1.0, 1.0, 0.0, 0.0], [0.1, 0.2]) == 1  # of the larger side as many as of the smaller: the first


@pytest.mark.parametrize("images", [1, 2, 5, 7])
def test_the_chance_is_counted_over_all_orders(images):
    """Where training changes nothing, each order of the losses of both is equally likely."""
    found = []
    for places in combinations(range(2 * images), images):
        trained = [float(place) for place in places]
        found.append(advantage([float(i) for i in range(2 * images) if i not in places], trained))
    for level in range(images + 1):
        as_high = sum(one >= level / images - 1e-9 for one in found) / len(found)
        assert chance(level / images, images=images) == pytest.approx(as_high, rel=1e-9)


def test_the_chance_of_published_tables():
    """Critical values of the one-sided two-sample Kolmogorov-Smirnov test: 6 of 8 at 1 %, 5 of 8 at 5 %."""
    assert chance(6 / 8, images=8) <= 0.01 < chance(5 / 8, images=8) <= 0.05 < chance(4 / 8, images=8)
    assert chance(0.02, images=100_000) == pytest.approx(math.exp(-2 * 0.02**2 * 50_000), rel=1e-3)  # Smirnov 1939


@pytest.mark.parametrize(
    ("images", "least"), [(5, None), (6, None), (7, 7), (8, 8), (9, 8), (16, 11), (27, 14), (28, 14), (64, 32)]
)
def test_how_many_must_be_told_apart_before_it_is_said(images, least):
    """Counted in fractions of integers: the first k whose C(2n, n - k) is at most a thousandth of C(2n, n)."""
    heard = [
        k
        for k in range(images + 1)
        if hint([Evaluation(10, 1.0, train_loss=0.5, advantage=k / images, chance=chance(k / images, images=images))])
    ]
    assert heard == ([] if least is None else list(range(least, images + 1)))
    if least is not None and least > images / 2:
        assert math.comb(2 * images, images - least) * 1000 <= math.comb(2 * images, images)
        assert math.comb(2 * images, images - least + 1) * 1000 > math.comb(2 * images, images)


def test_losses_that_do_not_differ_are_seldom_taken_for_memorised():
    numbers = np.random.default_rng(0)
    alarms = 0
    for _ in range(3000):
        held_out, trained = numbers.lognormal(size=(2, 16)).tolist()
        told = advantage(held_out, trained)
        alarms += bool(hint([Evaluation(1, 1.0, train_loss=1.0, advantage=told, chance=chance(told, images=16))]))
    assert alarms <= 6  # 1 is expected: 3000 times 0.000335


def test_the_hint_names_numbers_and_a_remedy():
    quiet = Evaluation(10, 0.5, train_loss=0.4, advantage=0.49, chance=1e-9)
    unsure = Evaluation(10, 0.5, train_loss=0.4, advantage=0.9, chance=0.002)
    loud = Evaluation(20, 0.5, train_loss=0.1, advantage=0.5, chance=0.001)
    older = Evaluation(20, 0.5, train_loss=0.1, advantage=0.5)  # of a checkpoint that knew another advantage
    assert hint([]) == ""
    assert hint([quiet]) == hint([unsure]) == hint([older]) == ""
    text = hint([quiet, loud])
    assert all(part in text for part in ("step 20", "0.1", "0.5", "0.50", "lower the"))
    assert hint([loud, quiet]) == ""  # what counts is how it is now
    assert len(text) <= 256  # a warning on the board


@pytest.mark.parametrize("told", [{}, {"advantage": 0.4, "chance": 1e-4}, {"advantage": 1.0, "chance": 0.5}])
def test_without_memorisation_the_hint_is_the_generalisation_loss(told):
    first, rising = Evaluation(10, 0.40, train_loss=0.40), Evaluation(20, 0.4201, train_loss=0.30, **told)
    assert "5% above that of step 10" in hint([first, rising])
    assert hint([first, replace(rising, loss=0.4199)]) == ""
    assert hint([first, replace(rising, train_loss=0.41)]) == ""  # both rise: that is no overfitting
    assert hint([first, replace(rising, train_loss=None)]) == ""


def test_a_warning_stays_the_same_while_it_holds():
    """Or each evaluation would add another one, and push others off the board."""
    curve = [
        Evaluation(10 * i, 0.5, train_loss=0.4 - i / 100, advantage=0.4 + i / 20, chance=1e-4) for i in range(1, 6)
    ]
    told = [warning(curve[:count]) for count in range(1, 6)]
    assert told[0] == ""
    assert told[1].startswith("step 20")
    assert len(set(told[1:])) == 1
    assert warning([*curve, Evaluation(60, 0.5, train_loss=0.4, advantage=0.1, chance=1.0)]) == ""
