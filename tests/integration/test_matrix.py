"""Every method on every family that it trains, on tiny models of the real classes, the way a pod does it.

A cell is a run of the trainer from its run file to exported files: the loss of what it trains on falls by the stated
factor, diffusers loads what was exported, and draws from it what the trainer drew with the weights in memory, which is
something else than the base model draws. A few cells run always, all of them nightly; the matrix is printed.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_api import combinations, names
from diffusion_trainer.models.inspection import TRAINABLE
from diffusion_trainer.rng import Purpose, stream
from testkit.attempts import TrainerJob
from testkit.tiny import make_image_folder
from testkit.tiny_families import make_tiny
from testkit.warm import WarmTrainers

STEPS = 8
PROMPT = {"prompt": "a <it> on it", "seed": 5, "steps": 3, "guidanceScale": 2}
WHOLE_BOOTH = "DreamBooth, whole"
"""DreamBooth of the whole denoiser, with class images: these make up half of each batch."""
FACTORS = {
    "LoRA": 0.97,
    "DreamBooth": 0.97,
    WHOLE_BOOTH: 0.95,
    "FineTune": 0.85,
    "FromScratch": 0.85,
    "Unconditional": 0.85,
    "TextualInversion": 0.999,
}
"""What is left of the loss after STEPS steps at most."""
RATES = {
    "LoRA": 2e-2,
    "DreamBooth": 2e-2,
    WHOLE_BOOTH: 1e-2,
    "FineTune": 1e-2,
    "FromScratch": 1e-2,
    "Unconditional": 1e-2,
    "TextualInversion": 0.5,
}
SECTIONS = {
    "DreamBooth": {"dreamBooth": {"instancePrompt": "a <it>", "priorLossWeight": 0}},
    WHOLE_BOOTH: {
        "dreamBooth": {
            "instancePrompt": "a <it>",
            "classPrompt": "a thing",
            "classImages": 2,
            "priorLossWeight": 0.5,
            "adapter": "None",
        }
    },
    "TextualInversion": {"textualInversion": {"token": "<it>", "initializerToken": "a", "vectors": 2}},
}
TEXT = {("LoRA", "SD3"), ("FineTune", "SD3"), ("DreamBooth", "SDXL")}
"""Cells in which text encoders are trained, too; of SD3 those of CLIP."""
ALWAYS = {("LoRA", "SD3"), ("FineTune", "SD2"), ("TextualInversion", "SDXL"), ("Unconditional", "UNet2D")}
CELLS = [
    pytest.param(method, family, marks=() if (method, family) in ALWAYS else pytest.mark.nightly)
    for method, family in itertools.product([*combinations.FAMILIES, WHOLE_BOOTH], TRAINABLE)
    if family in combinations.FAMILIES[method.partition(",")[0]]
]


@pytest.fixture(scope="module")
def trainers():
    with WarmTrainers() as started:
        yield started


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return what makes, once, a folder with a tiny model of a family and a few images."""
    made = {}

    def of(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            make_tiny(family, root / "model")
            make_image_folder(root / "data", 4)
            made[family] = root
        return made[family]

    return of


@pytest.fixture(scope="module")
def matrix(request):
    """Collect what cells say, and print it."""
    rows = {}
    yield rows
    plugins = request.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        terminal.ensure_newline()
        for (method, family), text in sorted(rows.items()):
            terminal.write_line(f"{method:17} {family:7} {text}")


def a_job(method, folder, inputs, trainers):
    job = TrainerJob(folder, inputs, trainers)
    spec = job.spec()
    formats = ["Diffusers"]
    wordless = method == "Unconditional"
    job.overrides = {
        "method": method.partition(",")[0],
        "lora": {"rank": 8, "alpha": 8} if method == "LoRA" else None,
        "dataset": spec["dataset"]
        | {"captions": {"prefix": "" if wordless else "<it> ", "dropout": 0}, "validation": {"fraction": 0.3}},
        "training": {
            "maxSteps": STEPS,
            "learningRate": RATES[method],
            "lrSchedule": {
                "name": "Constant",
                "warmupSteps": 1,
            },  # the first step moves nothing: its loss is the base's
            "objective": {"noiseOffset": 0},
        },
        "validation": {"everySteps": 1, "prompts": [PROMPT | ({"guidanceScale": 1} if wordless else {})]},
        "checkpoint": {"interval": "100steps"},
        "output": {"destination": spec["output"]["destination"], "formats": formats},
        **SECTIONS.get(method, {}),
    }
    job.run = {"microBatchSize": 4}
    return job


@pytest.mark.parametrize(("method", "family"), CELLS)
def test_cell(method, family, inputs, trainers, tmp_path, matrix):
    folder = inputs(family)
    job = a_job(method, tmp_path, folder, trainers)
    if (method, family) in TEXT:
        encoder = {"train": True, "learningRate": RATES[method] / 10}
        job.overrides["model"] = job.spec()["model"] | {"textEncoder": encoder}
    job.finish()
    lines = [json.loads(line) for line in (job.output / names.METRICS_FILE).read_text().splitlines()]
    before, after = lines[0]["train_subset_loss"], lines[-1]["train_subset_loss"]
    drawn = picture(job.output / names.SAMPLES_PREFIX / f"step-{STEPS:08d}.png")
    draw = sampled_without_words if family == "UNet2D" else sampled
    loaded = draw(pipeline(method, family, folder / "model", job.output / "diffusers"))
    base = draw(pipeline(None, family, folder / "model", None))
    changed, off = np.abs(loaded - base).mean(), np.abs(loaded - drawn).max()
    matrix[method, family] = (
        f"loss {before:.4f} -> {after:.4f}, picture changed by {changed:.2f}, reloaded to {off:.0f}"
    )
    assert after < FACTORS[method] * before
    assert off <= 2  # of 255
    assert changed > 0.5


def picture(path):
    """Return the only picture of a grid, without its frame."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").crop((4, 4, 68, 68))).astype(int)


def pipeline(method, family, model, exported):
    from diffusers import DiffusionPipeline

    whole = method is not None and method not in {"LoRA", "DreamBooth", "TextualInversion"}
    made = DiffusionPipeline.from_pretrained(exported if whole else model, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    if method in {"LoRA", "DreamBooth"}:
        made.load_lora_weights(exported, weight_name="pytorch_lora_weights.safetensors", local_files_only=True)
    elif method == "TextualInversion":
        made.load_textual_inversion(exported, weight_name="learned_embeds.safetensors", local_files_only=True)
        if family == "SDXL":
            made.load_textual_inversion(
                exported,
                weight_name="learned_embeds_2.safetensors",
                text_encoder=made.text_encoder_2,
                tokenizer=made.tokenizer_2,
                local_files_only=True,
            )
    return made


def sampled(made):
    """Draw as the trainer does: the same noise, DDIM or Euler, the same steps."""
    from diffusers import DDIMScheduler

    if not hasattr(made, "transformer"):
        made.scheduler = DDIMScheduler.from_config(made.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    channels = made.vae.config.latent_channels
    noise = stream(PROMPT["seed"], Purpose.SAMPLE).standard_normal((1, channels, 8, 8), dtype=np.float32)
    with torch.no_grad():
        image = made(
            PROMPT["prompt"],
            negative_prompt="",
            latents=torch.from_numpy(noise),
            num_inference_steps=PROMPT["steps"],
            guidance_scale=PROMPT["guidanceScale"],
            height=64,
            width=64,
            output_type="np",
        ).images[0]
    return np.rint(image * 255).astype(int)


def sampled_without_words(made):
    """The same of a model without text, whose pipeline takes no noise: its network and DDIM."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(made.scheduler.config)
    scheduler.set_timesteps(PROMPT["steps"])
    image = torch.from_numpy(stream(PROMPT["seed"], Purpose.SAMPLE).standard_normal((1, 3, 64, 64), dtype=np.float32))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            image = scheduler.step(made.unet(image, timestep).sample, timestep, image).prev_sample
    return np.rint(((image / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)[0].numpy()).astype(int)
