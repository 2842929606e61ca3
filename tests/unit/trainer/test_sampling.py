"""Which timesteps a picture is drawn at, and where each step goes; beside diffusers, over all numbers of steps."""

import pytest
import torch

from diffusion_trainer.objective import DiscreteProcess
from diffusion_trainer.sampling import samplers

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0).float()
NO_SIGNAL = torch.cat([ALPHAS[:-1], torch.zeros(1)])
PREDICTIONS = {"Epsilon": "epsilon", "VPrediction": "v_prediction", "Sample": "sample"}


def ddim(spacing, *, offset=1, **options):
    from diffusers import DDIMScheduler

    return DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, **options)


def process(alphas=ALPHAS, prediction="Epsilon", **config):
    return DiscreteProcess(alphas, prediction, config)


def times(steps, of=None, *, in_pixels=False):
    return samplers.ddim_timesteps(of or process(), steps, in_pixels=in_pixels)


@pytest.mark.parametrize("in_pixels", [False, True])
def test_timesteps_are_those_of_diffusers_unless_they_begin_too_early(in_pixels):
    """Its leading spacing divides integers: what remains of 1000 / steps is left out where the noise is strongest."""
    leading, trailing = (ddim(spacing, offset=0 if in_pixels else 1) for spacing in ("leading", "trailing"))
    others = set()
    for steps in range(1, 1001):
        found = torch.tensor(times(steps, in_pixels=in_pixels))
        leading.set_timesteps(steps)
        if not torch.equal(found, leading.timesteps):
            others.add(steps)
            # It counts down in floats, which round halves this way or that, and for 201 give a 202nd timestep, -1.
            trailing.set_timesteps(steps)
            assert (found - trailing.timesteps[:steps]).abs().max() <= 1
            assert found[0] == 999
        assert len(found) == steps
        assert 999 >= found[0] >= 1000 - 1000 // steps - 100  # one interval is skipped, and at most a tenth more
        assert found[-1] >= 0
        assert (found.diff() < 0).all()
    assert not others & {*range(1, 112), 125, 150, 200, 250, 300, 500}  # what people ask for is as diffusers has it
    assert set(range(501, 900)) <= others


@pytest.mark.parametrize(("steps", "first", "last"), [(30, 958, 1), (500, 999, 1), (501, 999, 1), (1000, 999, 0)])
def test_where_it_begins_and_ends(steps, first, last):
    found = times(steps)
    assert (found[0], found[-1]) == (first, last)


@pytest.mark.parametrize("steps", [1, 3, 30, 400, 1000])
def test_without_signal_at_the_end_it_begins_at_the_end(steps):
    wanted = ddim("trailing")
    wanted.set_timesteps(steps)
    assert list(times(steps, process(NO_SIGNAL, "VPrediction"))) == wanted.timesteps.tolist()
    assert list(times(steps, process(timestep_spacing="trailing"))) == wanted.timesteps.tolist()
    assert wanted.timesteps[0] == 999


@pytest.mark.parametrize("in_pixels", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_step_is_that_of_diffusers(prediction, in_pixels):
    theirs = ddim(
        "leading",
        offset=0 if in_pixels else 1,
        prediction_type=PREDICTIONS[prediction],
        clip_sample=in_pixels,
        set_alpha_to_one=in_pixels,
    )
    theirs.alphas_cumprod = ALPHAS
    theirs.final_alpha_cumprod = torch.tensor(1.0) if in_pixels else ALPHAS[0]
    theirs.set_timesteps(7)
    walk = samplers.Ddim(process(prediction=prediction), 7, in_pixels=in_pixels)
    numbers = torch.Generator().manual_seed(0)
    latents, answers = torch.randn(1, 4, 2, 2, generator=numbers), torch.randn(7, 1, 4, 2, 2, generator=numbers)
    for i, timestep in enumerate(theirs.timesteps):
        wanted = theirs.step(answers[i], timestep, latents).prev_sample
        torch.testing.assert_close(walk.step(i, answers[i], latents), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alphas", [ALPHAS, NO_SIGNAL])
@pytest.mark.parametrize("steps", [30, 400, 601, 1000])
def test_who_knows_the_image_arrives_at_it(steps, alphas):
    """Each step goes exactly to where the next begins: with the true v, the way is that of the image and its noise."""
    numbers = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 1, 4, 2, 2, generator=numbers)
    walk = samplers.Ddim(process(alphas, "VPrediction"), steps, in_pixels=False)

    def at(alpha):
        return alpha.sqrt() * image + (1 - alpha).sqrt() * noise

    latents = at(alphas[walk.times[0]])
    for i, time in enumerate(walk.times):
        torch.testing.assert_close(latents, at(alphas[time]), rtol=1e-3, atol=1e-3)
        v = alphas[time].sqrt() * noise - (1 - alphas[time]).sqrt() * image
        latents = walk.step(i, v, latents)
    torch.testing.assert_close(latents, at(alphas[0]), rtol=1e-3, atol=1e-3)
