"""Every family says to its networks what diffusers' own pipeline says to them, and draws the same pictures.

The independent reading of each folder is the pipeline; numbers that papers and model cards give are pinned.
"""

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_api.job import TrainerSpec
from diffusion_api.model import Model
from diffusion_api.run import RunConfig
from diffusion_api.training import Objective
from diffusion_api.validation import SamplePrompt
from diffusion_trainer.data import Plan, Share, open_loader
from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.data.transforms import Variant, geometry
from diffusion_trainer.errors import BadConfig
from diffusion_trainer.methods import TextPath
from diffusion_trainer.models import fetch_model, open_model
from diffusion_trainer.models.survey import look_at
from diffusion_trainer.objective import objective_of
from diffusion_trainer.objectstore import open_store
from diffusion_trainer.preparation import check_sizes
from diffusion_trainer.rng import Purpose, stream
from diffusion_trainer.sampling import sample_grid
from diffusion_trainer.stores import open_stores
from testkit.tiny_families import FAMILY_OF, make_tiny

TEXTS = ["SD2", "SDXL", "SD3"]
"""One of each way to encode text; SD1 has a file of its own."""
CAPTIONS = ["a cat", "", "eine Katze, 漢字 & more", "long " * 300]
SIDE, WIDE = 64, 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models, each made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(architecture):
        if architecture not in made:
            made[architecture] = make_tiny(architecture, root / architecture)
        return made[architecture]

    return folder


@pytest.fixture(scope="module")
def opened(folders):
    kept = {}

    def family(architecture, dtype=torch.float32, *, fresh=False, **objective):
        key = (architecture, dtype, *objective.items())
        if fresh or key not in kept:
            kept[key] = load(architecture, dtype, objective)
        return kept.pop(key) if fresh else kept[key]

    def load(architecture, dtype, objective):
        folder = folders(architecture)
        sections = {
            "method": "Unconditional" if architecture == "UNet2D" else "LoRA",
            "model": {"source": folder.as_uri()},
            "dataset": {"source": folder.as_uri(), "resolution": SIDE},
            "output": {"destination": folder.as_uri()},
            "training": {"objective": objective},
        }
        return open_model(folder, TrainerSpec.model_validate(sections), device="cpu", dtype=dtype)

    return family


@pytest.fixture(scope="module")
def pipelines(folders):
    from diffusers import DDIMScheduler, DiffusionPipeline

    made = {}

    def pipeline(architecture):
        if architecture not in made:
            pipe = DiffusionPipeline.from_pretrained(folders(architecture), local_files_only=True)
            if not architecture.startswith("SD3"):
                pipe.scheduler = DDIMScheduler.from_config(
                    pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False
                )
            pipe.set_progress_bar_config(disable=True)
            made[architecture] = pipe
        return made[architecture]

    return pipeline


def drawn(pipe, prompt, latents, **options):
    """Draw with a pipeline; return the picture in [0, 1] and what its denoiser was called with and answered."""
    calls = []
    denoiser = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    hook = denoiser.register_forward_hook(
        lambda _, args, kwargs, answer: calls.append((args, kwargs, answer[0])), with_kwargs=True
    )
    try:
        picture = pipe(
            prompt.prompt,
            negative_prompt=prompt.negative_prompt,
            latents=latents,
            num_inference_steps=prompt.steps,
            guidance_scale=prompt.guidance_scale,
            output_type="np",
            **options,
        ).images[0]
    finally:
        hook.remove()
    return picture, calls


def start(family, prompt, width, height):
    shape = (1, family.latent_channels, height // family.latent_scale, width // family.latent_scale)
    return torch.from_numpy(stream(prompt.seed, Purpose.SAMPLE).standard_normal(shape, dtype=np.float32))


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TEXTS)
def test_text_is_what_the_pipeline_makes_of_it(opened, pipelines, architecture):
    family, pipe = opened(architecture), pipelines(architecture)
    found = family.encode_text(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        if architecture.startswith("SD3"):
            text, _, pooled, _ = pipe.encode_prompt(caption, None, None, do_classifier_free_guidance=False)
        elif architecture == "SDXL":
            text, _, pooled, _ = pipe.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        else:
            text, pooled = pipe.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
        wanted = {"text": text[0]} | ({} if pooled is None else {"pooled": pooled[0]})
        assert found.keys() == wanted.keys() == set(family.conditioning_names)
        for name, rows in wanted.items():
            torch.testing.assert_close(found[name][i], rows, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", TEXTS)
def test_text_from_tokens_is_differentiable_and_the_same(opened, architecture):
    """What is cached where text encoders are trained: whole numbers, [B, length], and what T5 says, which never is."""
    family = opened(architecture, fresh=True)
    tokens = family.tokenize(CAPTIONS)
    assert tuple(tokens) == family.token_names
    said = {"text_3"} & tokens.keys()
    assert {name: rows.dtype for name, rows in tokens.items()} == {
        name: torch.float32 if name in said else torch.int64 for name in tokens
    }
    learning = [encoder for name, encoder in family.text_encoders.items() if not name.endswith("_3")]
    for encoder in family.text_encoders.values():
        encoder.requires_grad_(requires_grad=encoder in learning)
        if encoder not in learning:
            encoder.register_forward_pre_hook(lambda *_: pytest.fail("T5 runs in a step"), prepend=True)
    encoded = family.encode_tokens(tokens)
    for name, rows in opened(architecture).encode_text(CAPTIONS).items():
        torch.testing.assert_close(encoded[name].detach(), rows)
        assert not rows.requires_grad
    sum(rows.square().sum() for rows in encoded.values()).backward()
    for encoder in learning:
        assert encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_dropped_caption_of_sd3_is_empty_for_clip_and_t5_alike(opened):
    """SD3's batches carry CLIP's tokens and what T5 says; one draw decides over both."""
    family = opened("SD3")
    images = tuple(LockedImage(f"{i:064x}", f"{i}.png", 64, 64, f"a cat {i}", (64, 64), "train") for i in range(8))
    plan = Plan(DatasetLock(images, {}, {}), batch_size=8, seed=7, caption_dropout=0.5)
    texts = TextPath(family, live=True).cached([f"a cat {i}" for i in range(8)] + [""])

    class Cached:
        def latents(self, *_):
            return torch.zeros(16, 8, 8), torch.ones(16, 8, 8)

        def geometry(self, *_):
            return torch.zeros(6)

        def text(self, caption):
            row = int(caption[-1]) if caption else 8
            return {name: rows[row] for name, rows in texts.items()}

    objective = objective_of(family.process, Objective())
    ((batch,),) = open_loader(plan, Cached(), steps=range(1), share=Share(8), objective=objective)
    empty = {
        name: [torch.equal(row, texts[name][8]) for row in batch.conditioning[name]] for name in family.token_names
    }
    assert set(map(tuple, empty.values())) == {tuple(slot.drop_caption for slot in batch.slots)}
    assert set(empty["text_3"]) == {True, False}


def test_the_pooled_text_of_sdxl_is_the_second_encoders_projection_at_the_end_token(opened):
    """Not CLIP-L's, and not the hidden state: final norm, the place of the end token, times the projection."""
    family = opened("SDXL")
    encoder = family.text_encoders["text_encoder_2"]
    tokens = family.tokenize(["a cat"])["tokens_2"]
    end = tokens[0].tolist().index(encoder.config.eos_token_id)
    with torch.no_grad():
        normed = encoder(tokens).last_hidden_state[0, end].numpy()
    wanted = normed @ encoder.text_projection.weight.detach().numpy().T
    np.testing.assert_allclose(family.encode_text(["a cat"])["pooled"][0], wanted, atol=1e-6)


def test_the_text_of_sd3_is_clip_padded_with_zeros_and_t5_behind_it(opened):
    family = opened("SD3")
    text = family.encode_text(["a cat"])["text"][0]
    assert text.shape == (77 + 256, 96)
    assert (text[:77, 32 + 48 :] == 0).all()
    assert (text[77:].abs().sum(1) > 0).all()  # T5's padding is kept
    with torch.no_grad():
        tokens = family.tokenizers["tokenizer_3"](["a cat"], padding="max_length", max_length=256, return_tensors="pt")
        t5 = family.text_encoders["text_encoder_3"](tokens.input_ids).last_hidden_state[0]
    assert torch.equal(text[77:], t5)


# --- the denoiser ---------------------------------------------------------------------------------------------------

PROMPTS = (
    SamplePrompt(prompt="a cat", negative_prompt="blurry", seed=5, guidance_scale=5, steps=3),
    SamplePrompt(prompt="a dog", seed=6, guidance_scale=1, steps=2),
    SamplePrompt(prompt="a dog", seed=7, guidance_scale=3, steps=1),
)


@pytest.mark.parametrize("architecture", ["SD2-v", "SDXL", "SD3", "SD3.5"])
def test_pictures_and_predictions_are_those_of_the_pipeline(opened, pipelines, architecture):
    family, pipe = opened(architecture), pipelines(architecture)
    grid = sample_grid(family, PROMPTS, size=(WIDE, SIDE))
    for prompt, picture in zip(PROMPTS, grid.pictures, strict=True):
        latents = start(family, prompt, WIDE, SIDE)
        wanted, calls = drawn(pipe, prompt, latents, width=WIDE, height=SIDE)
        assert len(calls) == prompt.steps
        assert picture.size == (WIDE, SIDE)
        assert np.abs(np.asarray(picture) - wanted * 255).max() <= 1
        args, kwargs, answer = calls[0]
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        scaled = timestep.flatten()[:1] / (1000 if architecture.startswith("SD3") else 1)
        guided = prompt.guidance_scale != 1
        encoded = family.encode_text([prompt.negative_prompt, prompt.prompt] if guided else [prompt.prompt])
        rows = len(answer)
        told = torch.tensor([[SIDE, WIDE, 0.0, 0.0, SIDE, WIDE]]).expand(rows, -1)
        times = scaled.expand(rows)
        with torch.no_grad():
            found = family.predict(latents.expand(rows, -1, -1, -1), times, encoded, told)
        torch.testing.assert_close(found, answer, atol=1e-5, rtol=1e-4)


def test_time_ids_of_sdxl_are_those_of_the_crop_that_was_used(opened, pipelines):
    """A picture of 300 x 200, scaled to 96 x 64, of which the 64 x 64 from (20, 0) on are seen, mirrored."""
    family, pipe = opened("SDXL"), pipelines("SDXL")
    crop = geometry((300, 200), Variant((96, 64), 20, 0, flip=True), (64, 64))
    assert crop.numbers().tolist() == [200, 300, 0, 12, 64, 64]  # mirrored, 96 - 64 - 20 are cut off at the left
    prompt, latents = PROMPTS[1], start(family, PROMPTS[1], 64, 64)
    _, calls = drawn(
        pipe, prompt, latents, width=64, height=64,
        original_size=(200, 300), crops_coords_top_left=(0, 12), target_size=(64, 64),
    )  # fmt: skip
    _, kwargs, answer = calls[0]
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist() == [crop.numbers().tolist()]
    encoded = family.encode_text([prompt.prompt])
    time = torch.tensor([int(pipe.scheduler.timesteps[0])])
    with torch.no_grad():
        found = family.predict(latents, time, encoded, crop.numbers()[None])
        other = family.predict(latents, time, encoded, torch.tensor([[200.0, 300, 0, 20, 64, 64]]))
    torch.testing.assert_close(found, answer, atol=1e-5, rtol=1e-4)
    assert (found - other).abs().max() > 1e-4  # it makes a difference, so that a wrong crop would be seen


def test_an_unconditional_model_is_sampled_as_ddim_samples_it(opened, folders):
    from diffusers import DDIMScheduler, UNet2DModel

    family = opened("UNet2D")
    prompt = SamplePrompt(prompt="", seed=3, guidance_scale=7.5, steps=4)
    unet = UNet2DModel.from_pretrained(folders("UNet2D") / "unet")
    scheduler = DDIMScheduler.from_pretrained(folders("UNet2D") / "scheduler")
    scheduler.set_timesteps(4)
    image = start(family, prompt, 32, 32)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            image = scheduler.step(unet(image, timestep).sample, timestep, image).prev_sample
    wanted = ((image / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)[0].numpy()
    picture = sample_grid(family, [prompt], size=(32, 32)).pictures[0]
    assert np.abs(np.asarray(picture) - wanted).max() <= 1.01


@pytest.mark.parametrize(("architecture", "sampler"), [("SD2", "DDIM"), ("SD3", "Euler"), ("UNet2D", "DDIM")])
def test_the_sampler_is_named_in_the_parameters(opened, architecture, sampler):
    grid = sample_grid(opened(architecture), PROMPTS[1:2], size=(32, 32))
    assert f"Steps: 2, Sampler: {sampler}, CFG scale: 1" in grid.parameters[0]


@pytest.mark.parametrize("architecture", ["SDXL", "SD3.5", "UNet2D"])
def test_half_precision_answers_nearly_the_same(opened, architecture):
    full, half = opened(architecture), opened(architecture, torch.bfloat16)
    size = 8 if full.latent_scale == 8 else 32
    noisy = torch.randn(2, full.latent_channels, size, size, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.3, 0.9]) if architecture == "SD3.5" else torch.tensor([300, 900])
    told = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
    with torch.no_grad():
        wanted = full.predict(noisy, times, full.encode_text(["a", "b"]), told)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = half.predict(noisy, times, half.encode_text(["a", "b"]), told)
    assert (found.float() - wanted).square().mean() < 1e-3 * wanted.square().mean()
    trained_whole = architecture == "UNet2D"  # weights that are trained are never rounded
    wanted = torch.float32 if trained_whole else torch.bfloat16
    assert {p.dtype for p in half.denoiser.parameters()} == {wanted}
    encoders = {name: next(encoder.parameters()).dtype for name, encoder in half.text_encoders.items()}
    t5 = {"text_encoder_3"}  # twice as large as the denoiser
    assert all((dtype == torch.bfloat16) == (name in t5) for name, dtype in encoders.items())


def test_timesteps_of_flows_are_never_rounded_to_bf16(opened):
    """sd-scripts casts them to the dtype of the weights, where 507 of 1000 values are left."""
    family, seen = opened("SD3", torch.bfloat16, fresh=True), []
    family.denoiser.time_text_embed.time_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    sigmas = torch.tensor([0.5001, 0.5002])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        family.predict(torch.zeros(2, 16, 8, 8), sigmas, family.encode_text(["a", "b"]), torch.zeros(2, 6))
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == pytest.approx([500.1, 500.2], abs=1e-3)


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "scale", "shift"),
    [("SD2", 0.18215, 0.0), ("SDXL", 0.13025, 0.0), ("SD3", 1.5305, 0.0609)],
)
def test_latents_are_shifted_and_scaled_as_published(opened, pipelines, architecture, scale, shift):
    family, pipe = opened(architecture), pipelines(architecture)
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 96)).astype(np.float32))
    mean, std = family.encode_images(pixels)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    with torch.no_grad():
        back = pipe.vae.decode(mean / scale + shift).sample
    wanted = ((back / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    assert (family.decode(mean).float() - wanted).abs().max() <= 0.51


def test_another_vae_is_used_and_counts_for_the_cache(opened, folders, tmp_path):
    """The whole way: what `model.vae` names is fetched, encodes, decodes, and gives the cache other names."""
    own, donor = opened("SD2"), opened("SDXL")  # whose scale is another one
    sections = {
        "method": "LoRA",
        "model": {"source": folders("SD2").as_uri(), "vae": folders("SDXL").as_uri()},
        "dataset": {"source": folders("SD2").as_uri()},
        "output": {"destination": folders("SD2").as_uri()},
    }
    job = {"name": "a", "namespace": "b", "uid": "c"}
    run = RunConfig.model_validate({"job": job, "attempt": 1, "device": "CPU", "spec": sections})
    stores = open_stores(run, credentials=tmp_path)
    folder = fetch_model(stores.model, tmp_path / "work", report=lambda _: None)
    family = open_model(folder, run.spec, device="cpu", dtype=torch.float32)
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    mean, _ = family.encode_images(pixels)
    assert torch.equal(mean, donor.encode_images(pixels)[0])
    assert not torch.allclose(mean, own.encode_images(pixels)[0])
    assert torch.equal(family.decode(mean), donor.decode(mean))
    assert family.vae_hash() == donor.vae_hash() != own.vae_hash()
    assert family.text_hash() == own.text_hash()


def test_the_latents_of_an_unconditional_model_are_its_pixels(opened):
    family = opened("UNet2D")
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    mean, std = family.encode_images(pixels)
    assert torch.equal(mean, pixels)
    assert (std == 0).all()
    eight_bits = torch.arange(256, dtype=torch.float32).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    cached = family.encode_images(eight_bits / 127.5 - 1)[0].to(torch.bfloat16).float()  # as the cache keeps them
    assert torch.equal(family.decode(cached)[0, ..., 0].float(), eight_bits[0, 0])


def test_the_vae_of_sdxl_does_not_overflow(opened):
    """Its activations pass 65504, the largest number of fp16 (sd-scripts #653): black images, NaN latents."""
    family = opened("SDXL", torch.bfloat16, fresh=True)
    vae = family._autoencoder._vae
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e5)
    pixels = torch.ones(1, 3, 64, 64)
    mean, std = family.encode_images(pixels)
    assert mean.isfinite().all()
    assert std.isfinite().all()
    with torch.no_grad():
        assert not vae.half().encode(pixels.half()).latent_dist.mean.isfinite().all()  # the negative control


# --- what is where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "scale", "channels", "multiple"),
    [("SD1", 8, 4, 8), ("SD2-v", 8, 4, 8), ("SDXL", 8, 4, 8), ("SD3", 8, 16, 16), ("UNet2D", 1, 3, 2)],
)
def test_sizes(opened, architecture, scale, channels, multiple):
    family = opened(architecture)
    assert family.name == FAMILY_OF[architecture]
    assert (family.latent_scale, family.latent_channels, family.size_multiple) == (scale, channels, multiple)


def test_shapes_that_a_model_cannot_take_are_refused(opened):
    """SD3 cuts latents into patches of 2 x 2, so that 72 pixels, nine latents, are half a patch too many."""

    def lock(bucket):
        return DatasetLock((LockedImage("a", "a.png", 80, 80, "c", bucket, "train"),), {}, {})

    check_sizes(lock((80, 64)), opened("SD3"))
    check_sizes(lock((72, 64)), opened("SDXL"))
    with pytest.raises(BadConfig, match=r"dataset\.resolution .* 72 x 64, but this SD3 takes multiples of 16 only"):
        check_sizes(lock((72, 64)), opened("SD3"))


def test_the_preflight_knows_every_family_without_its_weights(folders, tmp_path):
    for architecture, family in FAMILY_OF.items():
        folder = folders(architecture)
        model = Model(source=folder.as_uri())
        found = look_at(model, open_store(folder.as_uri()), work=tmp_path / architecture)
        assert (found.family, found.architecture) == (family, None)
        weights = list((tmp_path / architecture).rglob("*.safetensors"))
        assert {path.stat().st_size for path in weights} == {0}


@pytest.mark.parametrize(("architecture", "most"), [("SD1", 77), ("SDXL", 77), ("SD3", 256), ("UNet2D", None)])
def test_captions_that_are_longer_than_the_model_reads(opened, architecture, most):
    family = opened(architecture)
    assert family.cut_off([]) == []
    if most is None:
        assert family.cut_off(["a" * 500]) == []
        return
    last = list(family.tokenizers)[-1]  # of SD3 that is T5's
    around = len(family.tokenizers[last]("a").input_ids) - 1  # marks: in these vocabularies a letter is a token
    fits, long = "a" * (most - around), "a" * (most - around + 1)
    assert [len(family.tokenizers[last](text).input_ids) for text in (fits, long)] == [most, most + 1]
    assert family.cut_off([fits, long, ""]) == [long]


@pytest.mark.parametrize(("architecture", "prediction"), [("SD2", "Epsilon"), ("SD2-v", "VPrediction")])
def test_sd2_predicts_what_its_scheduler_says(opened, architecture, prediction):
    assert opened(architecture).process.prediction_type == prediction
    other = opened(architecture, predictionType="Sample")
    assert other.process.prediction_type == "Sample"
    assert other.published.prediction_type == prediction  # and so it draws, until it is trained


def test_the_flow_of_sd3_has_the_shift_of_its_scheduler(opened):
    assert opened("SD3").process.shift == 3.0


@pytest.mark.parametrize(
    ("architecture", "attention", "feed_forward"),
    [
        ("SDXL", {f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")}, {"ff"}),
        (
            "SD3.5",
            {
                *(f"attn{i}.to_{part}" for i in ("", 2) for part in ("q", "k", "v", "out.0")),
                *(f"attn.add_{part}_proj" for part in "qkv"),
                "attn.to_add_out",
            },
            {"ff", "ff_context"},
        ),
    ],
)
def test_adapters_go_to_attention_and_feed_forward(opened, architecture, attention, feed_forward):
    family = opened(architecture)
    layers = {name for name, module in family.denoiser.named_modules() if isinstance(module, nn.Linear)}

    def adapted(targets):
        suffixes = family.lora_target_modules(targets)
        return {name for name in layers if name.endswith(tuple(f".{suffix}" for suffix in suffixes))}

    def of_blocks(name):
        return name.split("blocks.")[-1].partition(".")[2]

    assert {of_blocks(name) for name in adapted("Attention")} == attention
    both = {of_blocks(name) for name in adapted("AttentionAndFeedForward")}
    assert both == attention | {f"{block}.net.{part}" for block in feed_forward for part in ("0.proj", "2")}


def test_hashes_tell_what_a_cache_may_share(opened):
    full, half = opened("SD3"), opened("SD3", torch.bfloat16)
    assert full.vae_hash() == half.vae_hash()
    assert full.text_hash() != half.text_hash()  # T5 rounds
    assert opened("SDXL").text_hash() == opened("SDXL", torch.bfloat16).text_hash()
    assert len({opened(name).text_hash() for name in FAMILY_OF}) == len(FAMILY_OF) - 2 + 1
