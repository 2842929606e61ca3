"""The average of weights: its decay, its arithmetic, and that showing it changes nothing."""

import pytest
import torch

from diffusion_trainer.ema import Average, decay_at


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(3, generator=generator)) for name in "ab"}


@pytest.mark.parametrize(
    ("step", "decay"),
    # diffusers, EMAModel: "power=3/4 ... reaches decay factor 0.999 at 10K steps, 0.9999 at 215.4k steps"
    [(1, 0.405396), (10_000, 0.999), (215_443, 0.9999), (10**7, 0.9999)],
)
def test_the_decay_grows_as_a_power_law(step, decay):
    assert decay_at(step, limit=0.9999) == pytest.approx(decay, abs=1e-6)


def test_the_average_by_hand():
    parameters = _parameters()
    wanted = {name: p.detach().double() for name, p in parameters.items()}
    average = Average(parameters, decay=0.7)
    for step in range(1, 9):
        with torch.no_grad():
            for p in parameters.values():
                p.add_(step)
        average.update(step)
        decay = min(0.7, 1 - (1 + step) ** -0.75)
        wanted = {n: decay * w + (1 - decay) * parameters[n].detach().double() for n, w in wanted.items()}
    for name, tensor in average.tensors().items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(tensor, parameters[name])


def test_it_is_shown_and_put_away_bit_for_bit():
    parameters = _parameters()
    average = Average(parameters, decay=0.9)
    with torch.no_grad():
        for p in parameters.values():
            p.mul_(1.1)
    average.update(1)
    weights = {n: p.detach().clone() for n, p in parameters.items()}
    averages = {n: t.clone() for n, t in average.tensors().items()}
    with average.in_place():
        for name, p in parameters.items():
            assert torch.equal(p, averages[name])
            assert torch.equal(average.tensors()[name], weights[name])
    for name, p in parameters.items():
        assert torch.equal(p, weights[name])
        assert torch.equal(average.tensors()[name], averages[name])


def test_a_restored_average_goes_on_bit_for_bit():
    parameters, others = _parameters(), _parameters()
    average, restored = Average(parameters, decay=0.9), Average(others, decay=0.9)
    with torch.no_grad():
        for p in parameters.values():
            p.mul_(1.1)
    average.update(1)
    restored.restore({n: t.clone() for n, t in average.tensors().items()})
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(parameters[name])
    average.update(2)
    restored.update(2)
    for name, tensor in average.tensors().items():
        assert torch.equal(tensor, restored.tensors()[name])
