"""Rectified flow against closed forms, and what peers do otherwise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_api.training import Objective as Asked
from diffusion_trainer.errors import BadConfig
from diffusion_trainer.objective import (
    DiscreteObjective,
    DiscreteProcess,
    FlowObjective,
    FlowProcess,
    objective_of,
    process_as_asked,
    process_as_published,
)
from diffusion_trainer.objective.flow import shifted
from diffusion_trainer.rng import Purpose, stream

ALPHAS = torch.linspace(0.999, 0.005, 1000)


def draws(objective, count=4000):
    return np.array([objective.draw(stream(1, Purpose.TIMESTEP, 0, slot)) for slot in range(count)])


@pytest.mark.parametrize(
    ("sigma", "shift", "wanted"),
    [(0.5, 3.0, 0.75), (0.5, 1.0, 0.5), (0.0, 3.0, 0.0), (1.0, 3.0, 1.0), (0.25, 3.0, 0.5), (0.1, 2.0, 2 / 11)],
)
def test_the_shift_by_hand(sigma, shift, wanted):
    """arXiv 2403.03206, equation 23: the middle of the way becomes 3/4 with shift 3."""
    assert shifted(sigma, shift=shift) == pytest.approx(wanted)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_logit_normal_and_then_shifted(shift):
    """The quantiles of sigmoid(N(0, 1)) are sigmoids of the normal's: -1.2816, 0, 1.2816 at 10, 50 and 90 percent."""
    found = np.quantile(draws(FlowObjective(shift)), [0.1, 0.5, 0.9])
    plain = [1 / (1 + math.exp(1.2816)), 0.5, 1 / (1 + math.exp(-1.2816))]
    wanted = [shift * u / (1 + (shift - 1) * u) for u in plain]
    assert found == pytest.approx(wanted, abs=0.02)


def test_uniform_times_are_uniform():
    found = draws(FlowObjective(1.0, "Uniform"))
    assert np.quantile(found, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    assert found.min() > 0
    assert found.max() <= 1


def test_fine_detail_is_not_left_out():
    """diffusers' SD3 script indexes timesteps that are shifted already: 2.6 % below 0.3, a mean of 0.789.

    Shift 1 gives the paper's density: P(sigma < 0.3) = Phi(ln(0.3 / 0.7)) = 0.198.
    """
    found = draws(FlowObjective(1.0))
    assert (found < 0.3).mean() == pytest.approx(0.198, abs=0.02)
    assert found.mean() == pytest.approx(0.5, abs=0.01)


def test_sigma_is_continuous():
    """Not one of 1000 values, and none falls together with another in fp32."""
    found = torch.tensor(draws(FlowObjective(3.0)), dtype=FlowObjective(3.0).times_dtype)
    assert found.unique().numel() > 3990
    assert (found * 1000 % 1).unique().numel() > 3000


def test_noise_and_velocity_by_hand():
    objective = FlowObjective(3.0)
    latents, noise = torch.tensor([[[[2.0]]], [[[1.0]]]]), torch.tensor([[[[-1.0]]], [[[4.0]]]])
    times = torch.tensor([0.25, 1.0])
    assert objective.noisy(latents, noise, times=times).flatten().tolist() == [0.75 * 2 - 0.25, 4.0]
    perfect = torch.tensor([[[[-3.0]]], [[[3.0]]]])  # noise - x0
    assert objective.errors(perfect, latents, noise, times=times).tolist() == [0, 0]
    off = perfect + torch.tensor([[[[0.5]]], [[[2.0]]]])
    assert objective.errors(off, latents, noise, times=times).tolist() == [0.25, 4.0]


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.6, 0.9])
def test_the_loss_is_the_velocitys_and_not_that_of_x0(sigma):
    """diffusers (precondition_outputs) and sd-scripts take the error in x0 = x - sigma v, which is sigma^2 of ours."""
    numbers = torch.Generator().manual_seed(0)
    latents, noise, answer = torch.randn(3, 1, 16, 4, 4, generator=numbers)
    objective, times = FlowObjective(3.0), torch.tensor([sigma])
    ours = objective.errors(answer, latents, noise, times=times)
    denoised = objective.noisy(latents, noise, times=times) - sigma * answer
    theirs = (denoised - latents).square().mean()
    assert theirs / ours == pytest.approx(sigma**2, rel=1e-4)
    assert objective.weights(times).tolist() == [1.0]


def test_errors_are_fp32_whatever_the_denoiser_answers():
    answer = torch.full((1, 4, 2, 2), 1.0, dtype=torch.bfloat16)
    error = FlowObjective(1.0).errors(answer, torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 1.001), times=None)
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx(1e-6, rel=1e-2)  # in bf16 1.001 would be 1


# --- what a job asks for --------------------------------------------------------------------------------------------

NOISE = DiscreteProcess(ALPHAS, "Epsilon", {})
FLOW = FlowProcess(3.0, {})


def test_auto_is_what_the_model_was_made_for():
    assert process_as_asked(NOISE, Asked()) == NOISE
    assert process_as_asked(FLOW, Asked()) == process_as_asked(FLOW, Asked(prediction_type="Flow")) == FLOW
    assert objective_of(FLOW, Asked()) == FlowObjective(3.0, "LogitNormal")
    assert objective_of(FLOW, Asked()) == objective_of(FLOW, Asked(snr_gamma=None))  # the default has no meaning
    found = objective_of(NOISE, Asked())
    assert (found.prediction, found.sampling) == ("Epsilon", "Uniform")


def test_what_is_asked_for_is_honoured():
    assert process_as_asked(NOISE, Asked(prediction_type="VPrediction")).prediction_type == "VPrediction"
    assert objective_of(FLOW, Asked(shift=1.5, timestep_sampling="Uniform")) == FlowObjective(1.5, "Uniform")
    assert objective_of(NOISE, Asked(timestep_sampling="LogitNormal")).sampling == "LogitNormal"


@pytest.mark.parametrize(
    ("process", "asked", "message"),
    [
        (FLOW, {"prediction_type": "Epsilon"}, "predictionType is Epsilon, but the model is a flow; use Auto"),
        (NOISE, {"prediction_type": "Flow"}, "predictionType is Flow, but the model is no flow; use Auto"),
        (FLOW, {"zero_terminal_snr": True}, "zeroTerminalSNR is true, but the model is a flow.*leave it out"),
        (NOISE, {"zero_terminal_snr": True}, "zeroTerminalSNR is true, but the denoiser predicts.*VPrediction"),
        (FLOW, {"snr_gamma": 3}, "snrGamma is 3, but the model is a flow, .* not defined; leave it out"),
        (NOISE, {"shift": 3}, "shift is 3, but only flow models have one; leave it out"),
        (
            DiscreteProcess(torch.tensor([0.9, 0.5, 0.0]), "Epsilon", {}),
            {},
            "ends without any signal .* use VPrediction",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(process, asked, message):
    with pytest.raises(BadConfig, match=message):
        process_as_asked(process, Asked(**asked))


def test_before_any_training_a_model_predicts_what_it_was_published_for():
    asked = Asked(prediction_type="VPrediction", zero_terminal_snr=True)
    assert process_as_published(NOISE, asked, silent=False) == NOISE
    assert process_as_published(FLOW, Asked(shift=2), silent=False) == FLOW
    told = process_as_published(NOISE, asked, silent=True)
    assert told.prediction_type == "VPrediction"
    assert told.alphas_cumprod is NOISE.alphas_cumprod  # on its own schedule


def test_a_model_that_cannot_predict_what_it_says_predicts_what_the_job_says():
    """Its scheduler ends in nothing but noise and does not name v: the refusal's remedy has to be one."""
    mistaken = DiscreteProcess(torch.tensor([0.9, 0.5, 0.0]), "Epsilon", {})
    for prediction in ("VPrediction", "Sample"):
        found = process_as_published(mistaken, Asked(prediction_type=prediction), silent=False)
        assert found.prediction_type == prediction
        assert found.alphas_cumprod is mistaken.alphas_cumprod
    with pytest.raises(BadConfig, match="use VPrediction"):
        process_as_published(mistaken, Asked(), silent=False)


@pytest.mark.parametrize("prediction", ["VPrediction", "Sample"])
def test_a_schedule_is_rescaled_where_that_is_asked_for(prediction):
    asked = Asked(prediction_type=prediction, zero_terminal_snr=True)
    found = process_as_asked(NOISE, asked)
    assert (found.alphas_cumprod[-1], found.prediction_type) == (0, prediction)
    assert found.config == {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    own = process_as_asked(replace(NOISE, prediction_type=prediction), Asked(zero_terminal_snr=True))
    assert torch.equal(own.alphas_cumprod, found.alphas_cumprod)
    for off in (None, False):
        kept = process_as_asked(NOISE, Asked(prediction_type=prediction, zero_terminal_snr=off))
        assert kept.alphas_cumprod is NOISE.alphas_cumprod
        assert kept.config == {}


def test_zero_terminal_snr_goes_with_v():
    process = DiscreteProcess(torch.tensor([0.9, 0.5, 0.0]), "VPrediction", {})
    assert process_as_asked(process, Asked()) == process
    weights = objective_of(process, Asked(snr_gamma=5)).weights(torch.arange(3))
    assert weights.tolist() == pytest.approx([0.5, 1, 1])  # min(SNR + 1, 5) / (SNR + 1) of SNR 9, 1 and 0


def test_logit_normal_timesteps_stay_in_range():
    """Each of the 10 parts of the schedule as often as sigmoid(N(0, 1)) falls into it."""
    objective = DiscreteObjective.of(ALPHAS, prediction="Epsilon", gamma=None, sampling="LogitNormal")
    found = draws(objective)
    assert found.dtype == np.int64
    assert found.min() >= 0
    assert found.max() < 1000
    assert (found < 300).mean() == pytest.approx(0.198, abs=0.02)
