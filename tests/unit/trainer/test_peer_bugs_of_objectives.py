"""Bugs that other trainers had with noise, targets, weights and precision. Each is planted here, and must be found."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from diffusion_api.training import Objective as Asked
from diffusion_trainer.data.transforms import Geometry
from diffusion_trainer.device import Device
from diffusion_trainer.errors import BadConfig
from diffusion_trainer.fitting import set_attention
from diffusion_trainer.methods import fine_tune
from diffusion_trainer.models.autoencoder import Autoencoder
from diffusion_trainer.models.sd1 import StableDiffusion1
from diffusion_trainer.models.sd3 import StableDiffusion3
from diffusion_trainer.objective import DiscreteProcess, FlowObjective, FlowProcess, objective_of, process_as_asked
from diffusion_trainer.objective.discrete import add_noise, snr_weights, target
from diffusion_trainer.rng import Purpose, stream
from diffusion_trainer.sampling import grid
from testkit.tiny import UNET

ALPHAS = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)


def test_diffusers_sd3_takes_times_from_a_list_that_is_shifted_already():
    """Its script indexes the scheduler's timesteps: shift 3 although none was asked for, 2.6 % of sigmas below 0.3."""

    class Indexed(FlowObjective):
        def draw(self, numbers):
            index = min(int(super().draw(numbers) * 1000), 999)
            sigma = 1 - index / 1000  # the list begins with the most noise
            return 3 * sigma / (1 + 2 * sigma)

    def check(objective):
        found = np.array([objective.draw(stream(1, Purpose.TIMESTEP, 0, slot)) for slot in range(2000)])
        assert (found < 0.3).mean() == pytest.approx(0.198, abs=0.03)  # Phi(ln(0.3 / 0.7)), of the paper's density

    check(FlowObjective(1.0))
    with pytest.raises(AssertionError):
        check(Indexed(1.0))


def test_diffusers_and_sd_scripts_sd3_weigh_the_velocity_by_sigma_squared():
    """`precondition_outputs` of diffusers and all of sd-scripts measure x0: detail, at low sigma, counts a 100th."""

    class Preconditioned(FlowObjective):
        def errors(self, prediction, latents, noise, *, times):
            denoised = self.noisy(latents, noise, times=times) - times.view(-1, 1, 1, 1) * prediction
            return (denoised - latents).square().flatten(1).mean(1)

    def check(objective):
        latents, noise = torch.randn(2, 4, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        times = torch.tensor([0.1, 0.3, 0.6, 0.9])
        errors = objective.errors(noise - latents + 0.5, latents, noise, times=times)
        torch.testing.assert_close(errors, torch.full((4,), 0.25))  # 0.5 squared, wherever it is off by that

    check(FlowObjective(3.0))
    with pytest.raises(AssertionError):
        check(Preconditioned(3.0))


def test_sd_scripts_sd3_rounds_times_to_bf16():
    """It casts timesteps to the dtype of the weights, where 507 of 1000 values are left."""
    seen = []

    def denoiser(_noisy, *, timestep, **_conditioning):
        seen.append(timestep)
        return SimpleNamespace(sample=None)

    def rounding(noisy, *, timestep, **conditioning):
        return denoiser(noisy, timestep=timestep.bfloat16(), **conditioning)

    def check(network):
        sigmas = torch.arange(1000) / 1000
        conditioning = {"text": None, "pooled": None}
        StableDiffusion3.predict(SimpleNamespace(denoiser=network), None, sigmas, conditioning, None)
        assert seen[-1].unique().numel() == 1000

    check(denoiser)
    with pytest.raises(AssertionError):
        check(rounding)
    assert seen[-1].unique().numel() == 507


def test_diffusers_compute_snr_divides_by_nothing():
    """With zero terminal SNR the weight of epsilon is 0 / 0 at the last timestep, and the loss no number."""
    process = DiscreteProcess(torch.tensor([0.9, 0.5, 0.0]), "Epsilon", {})

    def check(choose):
        for asked in (Asked(snr_gamma=5), Asked(snr_gamma=5, prediction_type="VPrediction")):
            try:
                chosen = choose(process, asked)
            except BadConfig:
                continue
            assert objective_of(chosen, asked).weights(torch.arange(3)).isfinite().all()

    check(process_as_asked)
    with pytest.raises(AssertionError):
        check(lambda process, asked: process if asked.prediction_type == "Auto" else process_as_asked(process, asked))


@pytest.mark.parametrize("prediction", ["Epsilon", "VPrediction"])
def test_scripts_weigh_v_as_if_it_were_epsilon(prediction):
    """min-SNR weighs the error in x0 by min(SNR, gamma), whatever is predicted. Of v it is min(SNR, gamma) / (SNR + 1).

    x0 follows from x_t and the answer; the check solves for it, and knows nothing of the formulas.
    """
    latents, noise = torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = ALPHAS.view(-1, 1, 1, 1)

    def denoised(answer):
        noisy = add_noise(latents, noise, alphas=ALPHAS)
        if prediction == "Epsilon":
            return (noisy - (1 - a).sqrt() * answer) / a.sqrt()
        return a.sqrt() * noisy - (1 - a).sqrt() * answer

    def check(weigh):
        answer = target(latents, noise, alphas=ALPHAS, prediction=prediction)
        of_x0 = (denoised(answer + 0.1) - latents).square().flatten(1).mean(1)
        ratio = ALPHAS / (1 - ALPHAS)
        found = weigh(ALPHAS, gamma=5.0, prediction=prediction) * 0.1**2
        torch.testing.assert_close(found, ratio.clamp(max=5.0) * of_x0)

    def planted(alphas, *, gamma, prediction):
        other = {"Epsilon": "VPrediction", "VPrediction": "Epsilon"}[prediction]
        return snr_weights(alphas, gamma=gamma, prediction=other)

    check(snr_weights)
    with pytest.raises(AssertionError):
        check(planted)


def test_min_snr_weights_are_not_defined_for_flows():
    """Of a flow every error counts alike, whatever snrGamma is: its default must not weigh the velocity."""

    class Weighed(FlowObjective):
        def weights(self, times):
            ratio = ((1 - times) / times).square()
            return ratio.clamp(max=5.0) / (ratio + 1)

    def check(objective):
        assert torch.equal(objective.weights(torch.tensor([0.05, 0.3, 0.7, 1.0])), torch.ones(4))

    check(objective_of(FlowProcess(3.0, {}), Asked(snr_gamma=5)))
    with pytest.raises(AssertionError):
        check(Weighed(3.0))


def test_pictures_are_drawn_as_if_nothing_had_been_cut_off(monkeypatch):
    """Interfaces let the user say another crop than (0, 0), and SDXL draws pictures without a head."""

    class Family:
        denoiser, device, latent_channels, latent_scale, process = nn.Linear(1, 1), "cpu", 4, 8, None

        def decode(self, _latents):
            return torch.zeros(1, 8, 8, 3, dtype=torch.uint8)

        def release_encoders(self):
            """Nothing is loaded."""

    def check(geometry):
        told = []
        monkeypatch.setattr(grid, "Geometry", geometry)
        monkeypatch.setattr(grid, "denoised", lambda *_args, geometry, **_more: told.append(geometry))
        grid.draw(Family(), [grid.Wanted({}, seed=1, steps=1, guidance=1.0)], size=(96, 64))
        assert told[0].tolist() == [64, 96, 0, 0, 64, 96]  # original, crop, target; height before width

    check(Geometry)
    with pytest.raises(AssertionError):
        check(lambda **places: Geometry(**places | {"crop": (16, 0)}))


def test_sd_scripts_653_the_vae_of_sdxl_overflows_in_fp16():
    """Its activations pass 65504, the largest number of fp16: latents that are no numbers, and black images."""

    class Loud(nn.Module):
        def encode(self, pixels):
            latents = pixels * 1e5
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=latents, std=latents))

    class Half(Loud):
        def encode(self, pixels):
            return super().encode(pixels.half())

    def check(network):
        vae = Autoencoder.__new__(Autoencoder)
        vae._vae, vae._device, vae._factor, vae._shift = network, "cpu", 0.13025, 0.0
        mean, std = vae.encode(torch.ones(1, 4, 2, 2, dtype=torch.float16))
        assert mean.isfinite().all()
        assert std.isfinite().all()

    check(Loud())
    with pytest.raises(AssertionError):
        check(Half())


def test_the_fp16_attention_of_sd2_1_v_overflows():
    """Its products of queries and keys pass 65504; autocast takes back diffusers' `upcast_attention` of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DConditionModel(**UNET, upcast_attention=True).eval()
    for block in (module for module in network.modules() if isinstance(module, BasicTransformerBlock)):
        # One channel is 1 at each place, and makes 512 of each query and key: all their products are 2 ** 18 greater.
        block.norm1.weight.data[0], block.norm1.bias.data[0] = 0, 1
        for layer in (block.attn1.to_q, block.attn1.to_k):
            heads = layer.weight.data.unflatten(0, (block.attn1.heads, -1))
            heads[:, 0] = 512 * torch.eye(1, heads.shape[-1])

    def predicted(dtype):
        numbers = torch.Generator().manual_seed(1)
        noisy, text = torch.randn(2, 4, 8, 8, generator=numbers), torch.randn(2, 77, 32, generator=numbers)
        device = Device(SimpleNamespace(device=torch.device("cpu")), dtype)
        family = SimpleNamespace(denoiser=network.to(dtype))
        with torch.no_grad(), device.autocast():
            return StableDiffusion1.predict(family, noisy, torch.tensor([10, 900]), {"text": text}, None).float()

    set_attention(network, "Auto", device=torch.device("cpu"))
    wanted = predicted(torch.float32)

    def check():
        found = predicted(torch.float16)
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)

    check()
    network.set_attn_processor(AttnProcessor())
    with pytest.raises(AssertionError):
        check()


def test_diffusers_6363_trained_weights_are_kept_in_fp16(monkeypatch):
    """Its scripts train what they load in fp16: "Attempting to unscale FP16 gradients", or updates that round to 0."""
    spec = SimpleNamespace(
        fine_tune=SimpleNamespace(parts="All"), model=SimpleNamespace(text_encoder=SimpleNamespace(train=False))
    )

    def check():
        network = nn.Linear(4, 4).half()
        nn.init.ones_(network.weight)
        family = SimpleNamespace(denoiser=network, dtype=torch.float16)
        weight = fine_tune.attach_weights(family, spec).parameters["weight"]
        weight.data -= 1e-5  # an update
        assert (weight < 1).all()

    check()
    monkeypatch.setattr(fine_tune, "_freeze_others", lambda *_: None)
    with pytest.raises(AssertionError):
        check()


def test_the_padding_of_t5_is_set_to_zero():
    """SD3 was trained with what T5 says at its padding; trainers that set it to zero train on another text."""

    class Encoder(nn.Module):
        device = torch.device("cpu")

        def __init__(self, width):
            super().__init__()
            self.table = nn.Embedding(3, width)
            nn.init.ones_(self.table.weight)

        def forward(self, tokens, **_options):
            hidden = self.table(tokens)
            return SimpleNamespace(hidden_states=[hidden, hidden], last_hidden_state=hidden, text_embeds=hidden[:, 0])

    class Masked(Encoder):
        def forward(self, tokens, **options):
            found = super().forward(tokens, **options)
            found.last_hidden_state = found.last_hidden_state * (tokens > 0)[..., None]
            return found

    def tokenizer(captions, max_length, **_options):
        return SimpleNamespace(input_ids=torch.tensor([[2, 1] + [0] * (max_length - 2)] * len(captions)))

    def check(t5):
        encoders = {"text_encoder": Encoder(2), "text_encoder_2": Encoder(3), "text_encoder_3": t5}
        tokenizers = {name.replace("text_encoder", "tokenizer"): tokenizer for name in encoders}
        family = SimpleNamespace(text_encoders=encoders, tokenizers=tokenizers, device=torch.device("cpu"))
        with torch.no_grad():
            text = StableDiffusion3.encode_tokens(family, StableDiffusion3.tokenize(family, ["a"]))["text"]
        assert text.shape == (1, 77 + 256, 8)
        assert (text[:, :77, 5:] == 0).all()  # CLIP is padded in width
        assert (text[:, 77:] == 1).all()

    check(Encoder(8))
    with pytest.raises(AssertionError):
        check(Masked(8))
