"""Objectives against numbers computed in NumPy from the papers' formulas, never from our own output."""

import json

import numpy as np
import pytest
import torch

from diffusion_trainer.models.loading import load_discrete_process
from diffusion_trainer.objective import DiscreteObjective
from diffusion_trainer.objective.discrete import (
    add_noise,
    sample_losses,
    snr,
    snr_weights,
    target,
    without_terminal_signal,
)

# scaled_linear 0.00085 to 0.012 over 1000 steps: the schedule of every SD 1.x.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
ALPHAS = np.cumprod(1 - BETAS)
TIMESTEPS = [0, 100, 500, 900, 999]


def _data(seed=0, batch=3):
    numbers = np.random.default_rng(seed)
    latents, noise = numbers.standard_normal((2, batch, 4, 2, 2)).astype(np.float32)
    return latents, noise


def test_noise_is_mixed_by_the_square_roots_of_alpha():
    latents, noise = _data()
    a = ALPHAS[[0, 500, 999]].astype(np.float32)
    mixed = add_noise(torch.from_numpy(latents), torch.from_numpy(noise), alphas=torch.from_numpy(a))
    wanted = np.sqrt(a)[:, None, None, None] * latents + np.sqrt(1 - a)[:, None, None, None] * noise
    np.testing.assert_allclose(mixed.numpy(), wanted, rtol=1e-6)


def test_snr_of_sd1():
    # By hand: alphas_cumprod of SD 1.x is 0.99915 at t = 0 and 0.00466 at t = 999.
    ratio = snr(torch.from_numpy(ALPHAS))
    assert ratio[0] == pytest.approx(0.99915 / 0.00085, rel=1e-9)
    assert ratio[999] == pytest.approx(0.00466 / (1 - 0.00466), rel=1e-3)
    assert (ratio.diff() < 0).all()


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", ["Epsilon", "VPrediction", "Sample"])
def test_min_snr_weights(gamma, prediction):
    ratio = ALPHAS / (1 - ALPHAS)
    divisor = {"Epsilon": ratio, "VPrediction": ratio + 1, "Sample": np.ones(1000)}[prediction]
    weights = snr_weights(torch.from_numpy(ALPHAS), gamma=gamma, prediction=prediction)
    np.testing.assert_allclose(weights.numpy(), np.minimum(ratio, gamma) / divisor, rtol=1e-12)


def test_min_snr_weights_pinned():
    # gamma 5 caps the weight of easy timesteps at 5 / SNR: 5 / (0.99915 / 0.00085) at t = 0, and 1 where SNR < 5.
    weights = snr_weights(torch.from_numpy(ALPHAS), gamma=5.0, prediction="Epsilon")
    assert weights[0] == pytest.approx(0.004253615573237252, rel=1e-9)
    assert weights[900] == 1.0


def test_without_gamma_all_timesteps_weigh_the_same():
    assert snr_weights(torch.from_numpy(ALPHAS), gamma=None, prediction="Epsilon").unique().tolist() == [1.0]


def test_targets():
    latents, noise = (torch.from_numpy(value) for value in _data())
    a = torch.tensor([0.9, 0.5, 0.1])
    assert torch.equal(target(latents, noise, alphas=a, prediction="Epsilon"), noise)
    assert torch.equal(target(latents, noise, alphas=a, prediction="Sample"), latents)
    v = target(latents, noise, alphas=a, prediction="VPrediction").numpy()
    root, rest = np.sqrt([0.9, 0.5, 0.1])[:, None, None, None], np.sqrt([0.1, 0.5, 0.9])[:, None, None, None]
    np.testing.assert_allclose(v, root * noise.numpy() - rest * latents.numpy(), rtol=1e-5, atol=1e-6)


def test_a_perfect_v_prediction_gives_the_noise_back():
    # From x_t and v follow n = sqrt(a) v + sqrt(1 - a) x_t and x0 = sqrt(a) x_t - sqrt(1 - a) v (arXiv 2202.00512).
    latents, noise = (torch.from_numpy(value) for value in _data())
    a = torch.tensor([0.9, 0.5, 0.1])
    x, v = add_noise(latents, noise, alphas=a), target(latents, noise, alphas=a, prediction="VPrediction")
    a = a.view(-1, 1, 1, 1)
    torch.testing.assert_close(a.sqrt() * v + (1 - a).sqrt() * x, noise)
    torch.testing.assert_close(a.sqrt() * x - (1 - a).sqrt() * v, latents)


def test_the_loss_of_a_sample_is_its_own_mean_in_fp32():
    prediction = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    wanted = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[2.0, 0.0], [0.0, 0.0]]]])
    losses = sample_losses(prediction, wanted)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [1.0, 1.0]


def test_objective_uses_the_tables_of_each_timestep():
    objective = DiscreteObjective.of(torch.from_numpy(ALPHAS), prediction="Epsilon", gamma=5.0)
    latents, noise = _data(batch=5)
    timesteps = torch.tensor(TIMESTEPS)
    errors = objective.errors(
        torch.zeros(5, 4, 2, 2), torch.from_numpy(latents), torch.from_numpy(noise), times=timesteps
    )
    np.testing.assert_allclose(errors.numpy(), (noise**2).mean((1, 2, 3)), rtol=1e-6)
    ratio = (ALPHAS / (1 - ALPHAS))[TIMESTEPS]
    np.testing.assert_allclose(objective.weights(timesteps).numpy(), np.minimum(ratio, 5) / ratio, rtol=1e-6)
    noisy = objective.noisy(torch.from_numpy(latents), torch.from_numpy(noise), times=timesteps)
    a = ALPHAS[TIMESTEPS][:, None, None, None]
    np.testing.assert_allclose(noisy.numpy(), np.sqrt(a) * latents + np.sqrt(1 - a) * noise, rtol=1e-4, atol=1e-6)


def _published(config):
    """Return alphas_cumprod in fp64, from the papers: DDPM, latent diffusion, zero terminal SNR."""
    first, last = config["beta_start"], config["beta_end"]
    if config["beta_schedule"] == "linear":  # arXiv 2006.11239, section 4
        betas = first + (last - first) * np.arange(1000) / 999
    else:  # scaled_linear: linear in the square root
        betas = (first**0.5 + (last**0.5 - first**0.5) * np.arange(1000) / 999) ** 2
    alphas = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr"):  # arXiv 2305.08891, algorithm 1
        roots = np.sqrt(alphas)
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return alphas


STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "config",
    [
        STABLE_DIFFUSION,
        STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    ],
)
def test_noise_schedules_of_the_families(tmp_path, config):
    """SD1, SD2 and SDXL have the first, unconditional models the last; the second is how v is made to end in noise."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    found = load_discrete_process(tmp_path)
    np.testing.assert_allclose(found.alphas_cumprod.numpy(), _published(config), rtol=2e-4, atol=1e-7)
    assert found.prediction_type == ("VPrediction" if "prediction_type" in config else "Epsilon")
    assert (found.alphas_cumprod[-1] == 0) == ("rescale_betas_zero_snr" in config)


def test_a_schedule_rescaled_to_end_without_signal_is_the_published_one():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    found = without_terminal_signal(torch.from_numpy(ALPHAS).float())
    published = _published(STABLE_DIFFUSION | {"rescale_betas_zero_snr": True})
    np.testing.assert_allclose(found.numpy(), published, rtol=1e-4, atol=1e-8)
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(torch.from_numpy(BETAS)), 0)
    np.testing.assert_allclose(found.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-8)
    assert (found[0].item(), found[-1].item()) == (np.float32(ALPHAS[0]), 0)
    # By hand, half-way: sqrt(alphas_cumprod[500]) of SD 1.x is 0.5264, those of the ends 0.99957 and 0.06825.
    assert found[500].sqrt() == pytest.approx((0.5264 - 0.06825) * 0.99957 / (0.99957 - 0.06825), abs=1e-3)
    assert torch.equal(without_terminal_signal(found), found)  # it ends there already


@pytest.mark.parametrize("prediction", ["VPrediction", "Sample"])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_without_terminal_signal_min_snr_still_trains_where_sampling_begins(prediction, gamma):
    """The clip is then of SNR + 1, the weight of an error in v (arXiv 2202.00512, section 4)."""
    alphas = _published(STABLE_DIFFUSION | {"rescale_betas_zero_snr": True})
    ratio = alphas / (1 - alphas)
    wanted = np.minimum(ratio + 1, gamma) / (ratio + 1 if prediction == "VPrediction" else 1)
    objective = DiscreteObjective.of(torch.from_numpy(alphas), prediction=prediction, gamma=gamma)
    weights = objective.weights(torch.arange(1000)).numpy()
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)
    assert weights[-1] == min(1, gamma)
