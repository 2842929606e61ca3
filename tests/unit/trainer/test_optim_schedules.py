"""The learning rate against formulas and the schedulers of diffusers."""

import math

import numpy as np
import pytest
import torch

from diffusion_api.training import LRSchedule
from diffusion_trainer.optim import lr_at

PEAK, TOTAL, WARMUP = 1e-3, 100, 10


def _curve(total=TOTAL, warmup=WARMUP, **fields):
    schedule = LRSchedule(warmup_steps=warmup, **fields)
    return [lr_at(step, schedule, peak=PEAK, total_steps=total) for step in range(total + 1)]


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ({"name": "Constant"}, "constant_with_warmup", {}),
        ({"name": "Linear"}, "linear", {}),
        ({"name": "Cosine"}, "cosine", {}),
        ({"name": "CosineWithRestarts", "cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
    ],
)
def test_the_curves_are_those_of_diffusers_on_one_gpu_without_accumulation(ours, theirs, options):
    from diffusers.optimization import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=PEAK)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL, **options)
    wanted = []
    for _ in range(TOTAL + 1):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(_curve(**ours), wanted, rtol=1e-12, atol=1e-18)


def test_polynomial():
    curve = _curve(name="Polynomial", power=2.0)
    assert curve[WARMUP] == PEAK
    assert curve[55] == pytest.approx(PEAK * 0.25)  # half of the way: (1 - 0.5) ** 2
    assert curve[TOTAL] == 0


def test_inverse_sqrt_is_that_of_transformers():
    from transformers.optimization import get_inverse_sqrt_schedule

    for warmup in (0, WARMUP):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
        scheduler = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup)
        wanted = []
        for _ in range(TOTAL + 1):
            wanted.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        np.testing.assert_allclose(_curve(name="InverseSqrt", warmup=warmup), wanted, rtol=1e-12)


def test_warmup_stable_decay():
    curve = _curve(name="WarmupStableDecay")
    assert curve[5] == pytest.approx(PEAK / 2)
    assert curve[WARMUP:91] == [PEAK] * 81
    assert curve[95] == pytest.approx(PEAK / 2)  # the last tenth falls linearly
    assert curve[TOTAL] == 0


def test_the_first_half_of_cosine_by_hand():
    assert _curve(name="Cosine")[55] == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi / 2)))


@pytest.mark.parametrize("name", ["Constant", "Linear", "Cosine", "CosineWithRestarts", "Polynomial"])
def test_no_schedule_depends_on_processes_or_accumulation(name):
    """diffusers #9633 and a dozen more: the scheduler stepped once per process or micro-batch. Ours sees steps only."""
    schedule = LRSchedule(name=name, warmup_steps=WARMUP)
    for processes, accumulation in [(1, 1), (1, 4), (4, 1), (8, 2)]:
        micro_steps = range(TOTAL * accumulation)
        seen = {
            m // accumulation: lr_at(m // accumulation, schedule, peak=PEAK, total_steps=TOTAL) for m in micro_steps
        }
        assert list(seen.values()) == _curve(name=name)[:TOTAL], (processes, accumulation)


@pytest.mark.parametrize("warmup", [0, 1, TOTAL, 2 * TOTAL])
@pytest.mark.parametrize("name", [
    "Constant", "Linear", "Cosine", "CosineWithRestarts", "Polynomial", "InverseSqrt", "WarmupStableDecay",
])  # fmt: skip
def test_every_schedule_stays_between_zero_and_the_peak(name, warmup):
    curve = _curve(name=name, warmup=warmup)
    assert all(0 <= rate <= PEAK for rate in curve)
    assert curve[0] == (0 if warmup else PEAK)
