"""The learning rate against formulas and the schedulers of diffusers; the optimizer against AdamW made by hand."""

import math

import numpy as np
import pytest
import torch

from diffusion_api.training import LRSchedule, Optimizer
from diffusion_trainer.optim import apply_update, load_optimizer, lr_at, make_optimizer, optimizer_tensors

PEAK, TOTAL, WARMUP = 1e-3, 100, 10
CPU = torch.device("cpu")


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


def _problem():
    torch.manual_seed(0)
    return {"a": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.nn.Parameter(torch.randn(4))}


def _loss(parameters, step):
    return sum((p * (step + 1) - 0.5).square().sum() for p in parameters.values())


def _train(parameters, optimizer, steps, clip=1.0):
    for step in steps:
        _loss(parameters, step).backward()
        apply_update(optimizer, learning_rate=0.01 * (step + 1), max_grad_norm=clip)


def _adamw_by_hand(values, steps, *, clip, settings):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) with gradient clipping, in fp64."""
    m = {k: np.zeros_like(v) for k, v in values.items()}
    v2 = {k: np.zeros_like(v) for k, v in values.items()}
    for step in steps:
        rate, t = 0.01 * (step + 1), step + 1
        gradients = {k: 2 * (x * (step + 1) - 0.5) * (step + 1) for k, x in values.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for k, raw in gradients.items():
            g = raw * factor
            m[k] = settings.beta1 * m[k] + (1 - settings.beta1) * g
            v2[k] = settings.beta2 * v2[k] + (1 - settings.beta2) * g**2
            mean, square = m[k] / (1 - settings.beta1**t), v2[k] / (1 - settings.beta2**t)
            values[k] = values[k] * (1 - rate * settings.weight_decay) - rate * mean / (
                np.sqrt(square) + settings.epsilon
            )
    return values


@pytest.mark.parametrize("clip", [None, 0.1, 1e6])
def test_adamw_with_clipping_by_hand(clip):
    settings = Optimizer(weight_decay=0.1, beta1=0.8, beta2=0.95)
    parameters = _problem()
    wanted = _adamw_by_hand(
        {k: p.detach().double().numpy() for k, p in parameters.items()}, range(5), clip=clip, settings=settings
    )
    _train(parameters, make_optimizer(parameters, settings, device=CPU), range(5), clip)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach().numpy(), wanted[name], rtol=1e-5, atol=1e-7)


def test_the_norm_is_that_before_clipping():
    parameters = {"a": torch.nn.Parameter(torch.tensor([3.0, 4.0]))}
    optimizer = make_optimizer(parameters, Optimizer(), device=CPU)
    (parameters["a"].square().sum() / 2).backward()
    assert apply_update(optimizer, learning_rate=0.1, max_grad_norm=0.1).item() == pytest.approx(5.0)
    assert parameters["a"].grad is None


@pytest.mark.parametrize("at", [0, 1, 3])
def test_restored_optimizer_goes_on_bit_for_bit(at):
    straight = _problem()
    _train(straight, make_optimizer(straight, Optimizer(), device=CPU), range(6))

    first = _problem()
    optimizer = make_optimizer(first, Optimizer(), device=CPU)
    _train(first, optimizer, range(at))
    saved = {k: t.clone() for k, t in optimizer_tensors(optimizer, first).items()}
    weights = {k: p.detach().clone() for k, p in first.items()}

    second = {k: torch.nn.Parameter(w) for k, w in weights.items()}
    restored = make_optimizer(second, Optimizer(), device=CPU)
    load_optimizer(restored, second, tensors=saved, step=at)
    _train(second, restored, range(at, 6))
    for name in straight:
        assert torch.equal(straight[name], second[name])


def test_moments_have_the_names_of_their_parameters():
    parameters = _problem()
    optimizer = make_optimizer(parameters, Optimizer(), device=CPU)
    assert optimizer_tensors(optimizer, parameters) == {}
    _train(parameters, optimizer, range(1))
    assert sorted(optimizer_tensors(optimizer, parameters)) == [
        "a/exp_avg",
        "a/exp_avg_sq",
        "b/exp_avg",
        "b/exp_avg_sq",
    ]


def test_moments_of_other_parameters_are_refused():
    parameters = _problem()
    optimizer = make_optimizer(parameters, Optimizer(), device=CPU)
    with pytest.raises(ValueError, match=r"c/exp_avg"):
        load_optimizer(optimizer, parameters, tensors={"c/exp_avg": torch.zeros(1)}, step=1)
    with pytest.raises(KeyError):
        load_optimizer(optimizer, parameters, tensors={}, step=1)
