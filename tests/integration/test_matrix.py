"""Every method on every family that it trains, on tiny models of the real classes, the way a pod does it.

A cell is a run of the trainer from its run file to exported files: the loss of what it trains on falls by the stated
factor, diffusers loads what was exported, and draws from it what the trainer drew with the weights in memory, which is
something else than the base model draws. A few cells run always, all of them nightly; the matrix is printed.
"""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_api import combinations, names
from diffusion_api.job import TrainerSpec
from diffusion_trainer.rng import Purpose, stream
from testkit.attempts import TrainerJob
from testkit.tiny import make_image_folder
from testkit.tiny_families import make_tiny

STEPS = 8
PROMPT = {"prompt": "a <it> on it", "seed": 5, "steps": 3, "guidanceScale": 2}
TEXT = {"model": {"textEncoder": {"train": True, "learningRate": 1e-3}}}
BOOTH = {"instancePrompt": "a <it>", "priorLossWeight": 0}
PRIOR = {"instancePrompt": "a <it>", "classPrompt": "a thing", "classImages": 2, "priorLossWeight": 0.5}
"""With class images: these make up half of each batch."""
COLOURS = {"a a": (230, 40, 40), "b b": (30, 60, 220)}
SAMPLE = {"predictionType": "Sample", "snrGamma": None, "noiseOffset": 0}
"""What text says about a picture shows in the prediction of the picture itself, not in that of the noise."""
WITH_UNET = ("SD1", "SD2", "SDXL")


@dataclass(frozen=True)
class Way:
    """A method with what it is told, and the format to load again.

    `left` is what is left of the loss after STEPS steps at most; `left_of` that of families which differ. Attention
    alone moves little of SDXL, which has it in half of its blocks.
    """

    method: str
    rate: float
    left: float
    sections: dict = field(default_factory=dict)
    form: str = "Diffusers"
    families: tuple = ()
    left_of: dict = field(default_factory=dict)


def adapters(method="LoRA", form="Diffusers", families=(), left=0.9, **sections):
    return Way(method, 3e-2, left, sections, form, families, {"SDXL": 0.96})


def weights(method="FineTune", form="Diffusers", families=(), **sections):
    return Way(method, 1e-2, 0.8, sections, form, families)


def attention(parts, families=()):
    return Way("FineTune", 1e-2, 0.92, {"fineTune": {"parts": parts}}, "Diffusers", families, {"SDXL": 0.98})


def word(form):
    """Return how a word is learned that stands for other pictures than those that it begins with; see `taught`."""
    sections = {
        "textualInversion": {"token": "<it>", "initializerToken": "a", "vectors": 2},
        "training": {"objective": SAMPLE},
        "dataset": {"captions": {"default": "<it>", "dropout": 0}},
    }
    return Way("TextualInversion", 0.5, 0.5, sections, form, left_of={"SDXL": 0.7})


WAYS = {
    "LoRA": adapters(),
    "LoRA, Kohya": adapters(form="Kohya", families=WITH_UNET),
    "LoRA, single file": adapters(form="SingleFile"),
    "LoRA, attention": adapters(lora={"targets": "Attention"}),
    "LoRA, DoRA": adapters(lora={"useDora": True}),
    "LoRA, DoRA, text": adapters(families=WITH_UNET, lora={"useDora": True}, **TEXT),
    "LoRA, text": adapters(**TEXT),
    "LoRA, text, Kohya": adapters(form="Kohya", families=WITH_UNET, **TEXT),
    "DreamBooth": adapters("DreamBooth", dreamBooth=BOOTH),
    "DreamBooth, prior": adapters("DreamBooth", left=0.95, dreamBooth=PRIOR),
    "DreamBooth, text": adapters("DreamBooth", dreamBooth=BOOTH, **TEXT),
    "DreamBooth, whole": weights("DreamBooth", dreamBooth=BOOTH | {"adapter": "None"}),
    "DreamBooth, whole, prior": weights("DreamBooth", dreamBooth=PRIOR | {"adapter": "None"}),
    "FineTune": weights(),
    "FineTune, single file": weights(form="SingleFile"),
    "FineTune, attention": attention("Attention"),
    "FineTune, cross-attention": attention("CrossAttention", WITH_UNET),
    "FineTune, text": weights(**TEXT),
    "FromScratch": weights("FromScratch"),
    "FromScratch, text, single file": weights("FromScratch", "SingleFile", **TEXT),
    "Unconditional": weights("Unconditional"),
    "TextualInversion": word("Diffusers"),
    "TextualInversion, Kohya": word("Kohya"),
}
ALWAYS = {("LoRA", "SD3"), ("FineTune", "SD2"), ("TextualInversion", "SD1"), ("Unconditional", "UNet2D")}
CELLS = [
    pytest.param(way, family, marks=() if (way, family) in ALWAYS else pytest.mark.nightly)
    for way, told in WAYS.items()
    for family in told.families or combinations.FAMILIES[told.method]
]


def kind(way):
    """Return what a way trains."""
    uri = "s3://somewhere/"
    content = {"method": way.method, "dataset": {"source": uri}, "output": {"destination": uri}, **way.sections}
    content["dataset"] = {"source": uri}
    return TrainerSpec.model_validate(content | {"model": {"source": uri} | content.get("model", {})}).trains


def test_nothing_that_the_contract_allows_is_left_out():
    cells = {(WAYS[cell.values[0]].method, cell.values[1]) for cell in CELLS}
    assert cells == {(method, family) for method, families in combinations.FAMILIES.items() for family in families}
    written = {(kind(way), way.form) for way in WAYS.values()}
    assert written == {(what, form) for what, forms in combinations.FORMATS.items() for form in forms}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return what makes, once, a folder with a tiny model of a family and a few images."""
    made = {}

    def of(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            make_tiny(family, root / "model")
            if family == "SD3":
                rewrite(root / "model/text_encoder", as_published)
            make_image_folder(root / "data", 4)
            made[family] = root
        return made[family]

    return of


@pytest.fixture(scope="module")
def taught(tmp_path_factory, trainers):
    """Return what makes, once, a model of a family that draws what it is told, and pictures that are "b b" to it.

    Our own fine-tuning taught it that "a a" is red and "b b" is blue. It began as a network that hears what is said
    (cross-attention of a random one hardly does), with a VAE that is sure of its latents, as trained ones are.
    """
    made = {}

    def of(family):
        if family not in made:
            root = tmp_path_factory.mktemp(f"{family}-taught")
            make_tiny(family, root / "model")
            rewrite(root / "model/unet", lambda name, tensor: tensor * (10 if ".attn2.to_v." in name else 1))
            rewrite(root / "model/vae", sure)
            config = root / "model/vae/config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 1.0}))
            for seed, caption in enumerate(COLOURS):
                paint(root / "data", caption, seed=seed, captioned=True)
            job = TrainerJob(root / "lessons", root, trainers)
            job.overrides = lessons(job)
            job.run = {"microBatchSize": 8}
            job.finish()
            made[family] = tmp_path_factory.mktemp(f"{family}-word")
            (made[family] / "model").symlink_to(job.output / "diffusers")
            paint(made[family] / "data", "b b", seed=9, captioned=False)
        return made[family]

    return of


@pytest.fixture
def folder_of(inputs, taught):
    """Return what says which model and which pictures a cell has."""
    return lambda way, family: (taught if way.method == "TextualInversion" else inputs)(family)


def rewrite(folder, change):
    (path,) = folder.glob("*.safetensors")
    save_file({n: change(n, t) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})


def as_published(name, tensor):
    """Return a weight of SD3's CLIP-L, whose projection changes nothing: files in one piece leave it out."""
    return torch.eye(*tensor.shape) if name == "text_projection.weight" else tensor


def sure(name, tensor):
    """Return a VAE's weight, of the layer that says the variance with nothing but a small bias."""
    if name.startswith("quant_conv."):
        tensor[4:] = -20.0 if name.endswith("bias") else 0.0
    return tensor


def paint(folder, caption, *, seed, captioned):
    """Write four pictures of a caption's colour over its complement, with a little noise."""
    folder.mkdir(exist_ok=True)
    numbers = np.random.default_rng(seed)
    for i in range(4):
        pixels = np.broadcast_to(COLOURS[caption], (64, 64, 3)).copy()
        pixels[:32] = 255 - pixels[:32]
        noisy = (pixels + numbers.integers(-8, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{caption[0]}{i}.png")
        if captioned:
            (folder / f"{caption[0]}{i}.txt").write_text(caption)


def lessons(job):
    spec = job.spec()
    dataset = {"captions": {"dropout": 0}, "validation": {"fraction": 0}, "augmentation": {}}
    return {
        "method": "FineTune",
        "lora": None,
        "dataset": spec["dataset"] | dataset,
        "training": {
            "maxSteps": 60,
            "batchSize": 8,
            "learningRate": 5e-3,
            "lrSchedule": {"name": "Cosine", "warmupSteps": 2},
            "objective": SAMPLE,
        },
        "validation": {"everySteps": 1000},
        "checkpoint": {"interval": "1000steps"},
        "output": spec["output"] | {"formats": ["Diffusers"]},
    }


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
            terminal.write_line(f"{method:30} {family:7} {text}")


def a_job(way, folder, inputs, trainers):
    job = TrainerJob(folder, inputs, trainers)
    spec = job.spec()
    sections = dict(way.sections)
    wordless = way.method == "Unconditional"
    captions = {} if wordless else {"captions": {"prefix": "<it> ", "dropout": 0}}
    dataset = spec["dataset"] | captions | {"validation": {"fraction": 0.3}} | sections.pop("dataset", {})
    training = {
        "maxSteps": STEPS,
        "learningRate": way.rate,
        "lrSchedule": {"name": "Constant", "warmupSteps": 1},  # the first step moves nothing: its loss is the base's
        "objective": {"noiseOffset": 0},
    }
    job.overrides = {
        "method": way.method,
        "lora": None,
        "model": spec["model"] | sections.pop("model", {}),
        "dataset": {name: told for name, told in dataset.items() if not (wordless and name == "captions")},
        "training": training | sections.pop("training", {}),
        "validation": {"everySteps": 1, "prompts": [PROMPT | ({"guidanceScale": 1} if wordless else {})]},
        "checkpoint": {"interval": "100steps"},
        "output": spec["output"] | {"formats": [way.form]},
        **sections,
    }
    job.run = {"microBatchSize": 4}
    return job


def losses(job):
    """Return the loss on what is trained on, before and after."""
    lines = job.metrics()
    return lines[0]["train_subset_loss"], lines[-1]["train_subset_loss"]


@pytest.mark.parametrize(("name", "family"), CELLS)
def test_cell(name, family, folder_of, trainers, tmp_path, matrix):
    way = WAYS[name]
    folder = folder_of(way, family)
    job = a_job(way, tmp_path, folder, trainers)
    job.finish()
    before, after = losses(job)
    drawn = picture(job.output / names.SAMPLES_PREFIX / f"step-{STEPS:08d}.png")
    draw = sampled_without_words if family == "UNet2D" else sampled
    loaded = draw(reloaded(way, family, folder / "model", job.output))
    base = draw(pipeline(folder / "model"))
    changed, off = np.abs(loaded - base).mean(), np.abs(loaded - drawn).max()
    matrix[name, family] = f"loss {before:.4f} -> {after:.4f}, picture changed by {changed:.2f}, reloaded to {off:.0f}"
    assert after < way.left_of.get(family, way.left) * before
    assert off <= 2  # of 255
    assert changed > 0.5


@pytest.mark.nightly
def test_a_word_that_hardly_moves_lowers_no_loss(taught, trainers, tmp_path):
    """Negative control: nothing but the vectors lowers it."""
    job = a_job(replace(WAYS["TextualInversion"], rate=1e-6), tmp_path, taught("SD1"), trainers)
    job.finish()
    before, after = losses(job)
    assert after > 0.98 * before


def picture(path):
    """Return the only picture of a grid, without its frame."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").crop((4, 4, 68, 68))).astype(int)


def pipeline(folder):
    from diffusers import DiffusionPipeline

    return quiet(DiffusionPipeline.from_pretrained(folder, local_files_only=True))


def quiet(made):
    made.set_progress_bar_config(disable=True)
    return made


def reloaded(way, family, model, output):
    """Return a pipeline with what was exported."""
    what = kind(way)
    if way.form == "SingleFile":
        return from_single_file(family, model, output / "single-file/model.safetensors")
    if what == "Weights":
        return pipeline(output / "diffusers")
    made = pipeline(model)
    if what == "Embedding":
        teach(made, way.form, output)
    elif way.form == "Kohya":
        made.load_lora_weights(output / "kohya", weight_name="lora.safetensors", local_files_only=True)
    else:
        name = "pytorch_lora_weights.safetensors"
        made.load_lora_weights(output / "diffusers", weight_name=name, local_files_only=True)
    return made


def from_single_file(family, model, path):
    import diffusers
    import transformers

    kinds = {"SDXL": "StableDiffusionXLPipeline", "SD3": "StableDiffusion3Pipeline"}
    made, others = getattr(diffusers, kinds.get(family, "StableDiffusionPipeline")), {}
    if family == "SD3":  # T5, which is never trained: diffusers leaves one of its two names for the words empty
        others["text_encoder_3"] = transformers.T5EncoderModel.from_pretrained(model / "text_encoder_3")
    return quiet(
        made.from_single_file(str(path), config=str(model), local_files_only=True, torch_dtype=torch.float32, **others)
    )


def teach(made, form, output):
    """Teach a pipeline's encoders the word that was exported."""
    if form == "Kohya":
        learned = load_file(output / "kohya/it.safetensors")
        vectors = [learned[name] for name in ("emb_params", "clip_l", "clip_g") if name in learned]
    else:
        files = sorted((output / "diffusers").glob("learned_embeds*.safetensors"))
        vectors = [load_file(path)["<it>"] for path in files]
    pairs = [(made.text_encoder, made.tokenizer), *([(made.text_encoder_2, made.tokenizer_2)] if vectors[1:] else [])]
    for (encoder, tokenizer), rows in zip(pairs, vectors, strict=True):
        made.load_textual_inversion({"<it>": rows}, text_encoder=encoder, tokenizer=tokenizer)


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
