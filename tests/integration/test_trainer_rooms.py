"""The rooms on the real classes of diffusers, transformers and PEFT: SD1, adapters, sampling, and the whole path."""

import json
import shutil
import socket
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_api.validation import SamplePrompt
from diffusion_trainer.cache import build
from diffusion_trainer.data import Folder, Pictures, Plan, Share, Variants, freeze, open_loader
from diffusion_trainer.errors import BadData
from diffusion_trainer.methods import attach
from diffusion_trainer.models import open_model
from diffusion_trainer.objective import objective_of
from diffusion_trainer.objectstore import open_store
from diffusion_trainer.rng import Purpose, stream
from diffusion_trainer.sampling import sample_grid
from diffusion_trainer.validation import validate
from testkit.tiny import make_image_folder, make_tiny_sd1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_sd1(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def spec(folder, **sections):
    return TrainerSpec.model_validate(
        {
            "method": "LoRA",
            "model": {"source": folder.as_uri()},
            "dataset": {"source": folder.as_uri(), "resolution": 64},
            "output": {"destination": folder.as_uri()},
            **sections,
        }
    )


def opened(folder, dtype=torch.float32):
    return open_model(folder, spec(folder), device="cpu", dtype=dtype)


@pytest.fixture
def family(folder):
    return opened(folder)


@pytest.fixture
def pipeline(folder):
    """The independent reading of the same folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(count=2, height=64, width=80):
    numbers = np.random.default_rng(0).uniform(-1, 1, (count, 3, height, width))
    return torch.from_numpy(numbers.astype(np.float32))


# --- loading -------------------------------------------------------------------------------------------------------


def test_the_tiny_model_is_a_function_of_its_seed(folder, tmp_path):
    again, other = make_tiny_sd1(tmp_path / "again"), make_tiny_sd1(tmp_path / "other", seed=1)
    for path in sorted(folder.rglob("*.*")):
        if path.is_file():
            assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (other / weights).read_bytes() != (folder / weights).read_bytes()


def test_opening_a_model_needs_no_network(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model may not be looked for elsewhere")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert opened(folder).name == "SD1"


def test_text_is_what_the_pipeline_makes_of_it(family, pipeline):
    captions = ["a cat", "", "eine Katze, 漢字 & more", "long " * 60]
    for caption, row in zip(captions, family.encode_text(captions)["text"], strict=True):
        wanted, _ = pipeline.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
        assert row.shape == (77, 32)
        assert torch.allclose(row, wanted[0], atol=1e-6)


def test_latents_are_the_posterior_times_the_scaling_factor(family, pipeline):
    mean, std = family.encode_images(pixels())
    posterior = pipeline.vae.encode(pixels()).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 10)
    assert torch.allclose(mean, posterior.mean * 0.18215, atol=1e-6)
    assert torch.allclose(std, posterior.std * 0.18215, atol=1e-6)
    assert not mean.requires_grad


def test_decoding_undoes_the_scale(family, pipeline):
    latents = torch.randn(1, 4, 8, 10, generator=torch.Generator().manual_seed(0))
    wanted = pipeline.vae.decode(latents / 0.18215).sample
    wanted = pipeline.image_processor.postprocess(wanted.detach(), output_type="np")
    found = family.decode(latents)
    assert (found.shape, found.dtype) == ((1, 64, 80, 3), torch.uint8)
    assert np.abs(found.numpy() - wanted * 255).max() <= 0.51


def test_the_noise_schedule_is_stable_diffusions(family):
    """sigma = sqrt((1 - a) / a) is 14.6146 at the last timestep of SD1 and 0.0292 at the first (k-diffusion)."""
    schedule = family.process
    sigmas = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    assert len(sigmas) == 1000
    assert sigmas[-1] == pytest.approx(14.6146, abs=1e-3)
    assert sigmas[0] == pytest.approx(0.0292, abs=1e-4)
    assert schedule.prediction_type == "Epsilon"


def rewrite(path, change):
    tensors = {name: tensor for old, value in load_file(path).items() for name, tensor in change(old, value)}
    save_file(tensors, path, metadata={"format": "pt"})


def test_text_encoders_of_older_releases_are_read(copy, family):
    """transformers dropped the prefix `text_model.` in 5.6; every published SD1 has it, and a stored buffer."""
    path = copy / "text_encoder/model.safetensors"
    rewrite(path, lambda name, value: [("text_model." + name, value)])
    tensors = load_file(path) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(tensors, path, metadata={"format": "pt"})
    assert torch.equal(opened(copy).encode_text(["a cat"])["text"], family.encode_text(["a cat"])["text"])


def test_vaes_of_older_releases_are_read(copy, family):
    """The VAE of the published SD1 has its attention's linear layers under their names of 2022."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(name, value):
        for new, former in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, former)
        return [(name, value)]

    rewrite(copy / "vae/diffusion_pytorch_model.safetensors", change)
    assert torch.equal(opened(copy).encode_images(pixels())[0], family.encode_images(pixels())[0])


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_missing_are_never_made_up(copy, component):
    (path,) = (copy / component).glob("*.safetensors")
    dropped = sorted(load_file(path))[3]
    rewrite(path, lambda name, value: [] if name == dropped else [(name, value)])
    with pytest.raises(BadData, match=f"{component}.*(missing|cannot be loaded)"):
        opened(copy)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_of_another_shape_and_files_that_are_none_are_refused(copy, component):
    (path,) = (copy / component).glob("*.safetensors")
    changed = next(name for name, value in sorted(load_file(path).items()) if value.ndim == 2)
    rewrite(path, lambda name, value: [(name, value[:-1].clone() if name == changed else value)])
    with pytest.raises(BadData, match=component):
        opened(copy)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(BadData, match=component):
        opened(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    vocabulary = json.loads((copy / "tokenizer/vocab.json").read_text())
    vocabulary |= {f"word{i}": len(vocabulary) + i for i in range(3)}
    (copy / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(BadData, match="the tokenizer has 517 words and the text encoder 514"):
        opened(copy)
    (copy / "tokenizer/merges.txt").write_text("#version: 0.2\nnot there\n")
    with pytest.raises(BadData, match="tokenizer cannot be loaded"):
        opened(copy)


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"prediction_type": "v_prediction"}, True),
        ({"prediction_type": "x"}, False),
        ({"num_train_timesteps": 50}, False),
        ({"beta_schedule": "x"}, False),
    ],
)
def test_the_noise_scheduler_is_checked(copy, change, allowed):
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if allowed:
        assert opened(copy).process.prediction_type == "VPrediction"
    else:
        with pytest.raises(BadData, match="scheduler_config"):
            opened(copy)


def test_hashes_follow_the_files(copy, family):
    assert opened(copy).vae_hash() == family.vae_hash()
    (copy / "tokenizer/merges.txt").write_text("#version: 0.1\n")
    changed = opened(copy)
    assert changed.vae_hash() == family.vae_hash()
    assert changed.text_hash() != family.text_hash()
    rewrite(copy / "vae/diffusion_pytorch_model.safetensors", lambda name, value: [(name, value + 1e-3)])
    assert opened(copy).vae_hash() != family.vae_hash()
    assert set(family.file_hashes()) == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


# --- adapters ------------------------------------------------------------------------------------------------------


def predicted(family, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(2, 4, 8, 8, generator=numbers), torch.randn(2, 77, 32, generator=numbers)
    with torch.no_grad():
        return family.denoiser(latents.to(family.dtype), torch.tensor([10, 900]), text.to(family.dtype)).sample


def add_lora(family, lora, *, seed):
    return attach(family, spec(PurePosixPath("/nowhere"), lora=lora.model_dump(by_alias=True)), seed=seed).parameters


def test_an_adapted_model_begins_as_the_base_model(family):
    before = predicted(family)
    parameters = add_lora(family, LoRA(rank=4, alpha=8), seed=1)
    assert torch.equal(predicted(family), before)
    assert all(parameter.abs().sum() == 0 for name, parameter in parameters.items() if ".lora_B." in name)
    assert all(parameter.abs().sum() > 0 for name, parameter in parameters.items() if ".lora_A." in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_fp32_and_nothing_else_is_trained(folder, dtype):
    family = opened(folder, dtype)
    parameters = add_lora(family, LoRA(rank=3), seed=1)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    wanted = {id(parameter) for parameter in parameters.values()}
    assert {id(p) for p in family.denoiser.parameters() if p.requires_grad} == wanted
    assert {p.dtype for p in family.denoiser.parameters() if id(p) not in wanted} == {dtype}
    assert predicted(family).dtype == dtype


ATTENTION = {f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")}
FEED_FORWARD = {"ff.net.0.proj", "ff.net.2"}


@pytest.mark.parametrize(
    ("targets", "layers"), [("Attention", ATTENTION), ("AttentionAndFeedForward", ATTENTION | FEED_FORWARD)]
)
def test_exactly_the_targets_get_an_adapter(family, targets, layers):
    parameters = add_lora(family, LoRA(rank=2, targets=targets), seed=1)
    blocks = [
        *(f"down_blocks.{i}.attentions.0" for i in (0, 1)),
        "mid_block.attentions.0",
        *(f"up_blocks.{i}.attentions.{k}" for i in (0, 1) for k in (0, 1)),
    ]
    assert set(parameters) == {
        f"{block}.transformer_blocks.0.{layer}.lora_{part}.weight"
        for block in blocks
        for layer in layers
        for part in "AB"
    }
    assert list(parameters) == sorted(parameters)
    query = parameters["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"]
    assert query.shape == (2, 32)


def test_initial_values_depend_on_seed_and_name_alone(folder, family):
    state = torch.get_rng_state()
    one = add_lora(family, LoRA(rank=4), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    two = add_lora(opened(folder), LoRA(rank=4, targets="Attention"), seed=1)
    assert all(torch.equal(one[name], two[name]) for name in two)
    three = add_lora(opened(folder), LoRA(rank=4), seed=2)
    assert not any(torch.equal(one[name], three[name]) for name in one if ".lora_A." in name)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    uniform = stream(1, Purpose.INITIALISATION, name).random((4, 32), dtype=np.float32)
    assert np.allclose(one[name].detach().numpy(), (2 * uniform - 1) / np.sqrt(32), atol=1e-7)


# --- sampling ------------------------------------------------------------------------------------------------------

PROMPTS = (
    SamplePrompt(prompt="a cat", negative_prompt="blurry", seed=5, guidance_scale=7.5, steps=4),
    SamplePrompt(prompt="ein Kätzchen 漢字", seed=6, guidance_scale=1, steps=3),
)


def test_pictures_are_those_of_the_pipeline(family, pipeline):
    grid = sample_grid(family, PROMPTS, size=(64, 48))
    for prompt, picture in zip(PROMPTS, grid.pictures, strict=True):
        noise = stream(prompt.seed, Purpose.SAMPLE).standard_normal((1, 4, 6, 8), dtype=np.float32)
        wanted = pipeline(
            prompt.prompt,
            negative_prompt=prompt.negative_prompt,
            latents=torch.from_numpy(noise),
            num_inference_steps=prompt.steps,
            guidance_scale=prompt.guidance_scale,
            height=48,
            width=64,
            output_type="np",
        ).images[0]
        assert picture.size == (64, 48)
        assert np.abs(np.asarray(picture) - wanted * 255).max() <= 1


def test_half_precision_draws_nearly_the_same(folder, family):
    picture = np.asarray(sample_grid(family, PROMPTS[:1], size=(64, 64)).pictures[0]).astype(int)
    half = np.asarray(sample_grid(opened(folder, torch.bfloat16), PROMPTS[:1], size=(64, 64)).pictures[0]).astype(int)
    assert np.abs(picture - half).mean() < 3


def test_grids_are_deterministic_and_carry_their_parameters(family, tmp_path):
    family.denoiser.train()
    grid = sample_grid(family, PROMPTS, size=(64, 64))
    assert family.denoiser.training
    assert sample_grid(family, PROMPTS, size=(64, 64)).grid_png() == grid.grid_png()
    (tmp_path / "0.png").write_bytes(grid.picture_png(0))
    (tmp_path / "1.png").write_bytes(grid.picture_png(1))
    (tmp_path / "grid.png").write_bytes(grid.grid_png())
    assert Image.open(tmp_path / "0.png").text["parameters"] == (
        "a cat\nNegative prompt: blurry\nSteps: 4, Sampler: DDIM, CFG scale: 7.5, Seed: 5, Size: 64x64"
    )
    assert Image.open(tmp_path / "1.png").text["parameters"].startswith("ein Kätzchen 漢字\nSteps: 3, ")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 128
        assert "blurry" in image.text["parameters"]
    alone = sample_grid(family, PROMPTS[1:], size=(64, 64))
    assert alone.picture_png(0) == grid.picture_png(1)


def test_pictures_follow_the_weights_in_memory(family):
    before = sample_grid(family, PROMPTS[:1], size=(64, 64)).picture_png(0)
    for name, parameter in add_lora(family, LoRA(rank=4), seed=1).items():
        if ".lora_B." in name:
            torch.nn.init.constant_(parameter, 0.05)
    assert sample_grid(family, PROMPTS[:1], size=(64, 64)).picture_png(0) != before
    with pytest.raises(ValueError, match="no prompt"):
        sample_grid(family, (), size=(64, 64))


# --- the whole path ------------------------------------------------------------------------------------------------


def test_from_a_folder_of_images_to_a_falling_loss(family, tmp_path):
    data = make_image_folder(tmp_path / "data", 12, sizes=((64, 64), (96, 64)))
    out = open_store((tmp_path / "out").as_uri())
    sections = {"source": data.as_uri(), "resolution": 64, "buckets": {"step": 16}, "filters": {"minSide": 32}}
    job = spec(data, dataset=sections | {"validation": {"fraction": 0.2}}, training={"batchSize": 4})
    source = open_store(data.as_uri())
    lock = freeze(job.dataset, (Folder(source),), seed=1, batch_size=4, work=tmp_path, report=lambda _: None)
    variants = Variants(job.dataset.augmentation, seed=1)
    pictures = Pictures([source], tmp_path)
    cache = build(lock, family, out, variants=variants, pictures=pictures, report=lambda _: None)
    plan = Plan(lock, batch_size=4, seed=1, variants=2, caption_dropout=0.1)
    objective, alphas = objective_of(family.process, job.training.objective), family.process.alphas_cumprod

    def loss(batch):
        a = alphas[batch.times].view(-1, 1, 1, 1)
        noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * batch.noise
        predicted = family.predict(noisy, batch.times, batch.conditioning, batch.geometry)
        return (predicted - batch.noise).square().mean((1, 2, 3))

    parameters = add_lora(family, LoRA(rank=8, alpha=16), seed=1)
    before = validate(lock, cache, loss, objective=objective, seed=1, batch_size=8, device="cpu")
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-2)
    for pieces in open_loader(plan, cache, steps=range(12), share=Share(2), objective=objective):
        optimizer.zero_grad()
        for piece in pieces:
            (loss(piece).sum() / 4).backward()
        optimizer.step()
    after = validate(lock, cache, loss, objective=objective, seed=1, batch_size=8, device="cpu")
    assert after.images == before.images == 2
    assert after.loss < before.loss * 0.95
