"""Every field of a job, with every method and family: honoured, or refused with a reason. None is ignored.

A field that waits for a switch beside it (`ema.decay` for `ema.enabled`, `lrSchedule.cycles` for its schedule) counts
as honoured: the guides say what it waits for.
"""

import ast
import itertools
from pathlib import Path

import pytest
from pydantic.alias_generators import to_snake

from diffusion_api.combinations import FAMILIES
from diffusion_api.job import TrainerSpec
from diffusion_api.supported import LIMITS
from testkit.fields import optional

ROOT = Path(__file__).resolve().parents[2]
PROMPTED = {"instancePrompt": "a photo of sks dog", "classPrompt": "a photo of a dog"}
SECTIONS = {
    "DreamBooth": {"dreamBooth": PROMPTED},
    "whole DreamBooth": {"dreamBooth": PROMPTED | {"adapter": "None"}},
    "TextualInversion": {"textualInversion": {"token": "<a>", "initializerToken": "a"}},
}
COMBINATIONS = [
    (kind, family)
    for kind in (
        "LoRA",
        "DreamBooth",
        "whole DreamBooth",
        "FineTune",
        "FromScratch",
        "Unconditional",
        "TextualInversion",
    )
    for family in FAMILIES[kind.removeprefix("whole ")]
]
NEVER = ()
SD3, NOT_SD3 = (lambda _, family: family == "SD3"), (lambda _, family: family != "SD3")
WORDLESS = lambda kind, _: kind == "Unconditional"  # noqa: E731
PROMPT_GIVEN = lambda kind, _: kind in {"Unconditional", "DreamBooth", "whole DreamBooth"}  # noqa: E731
INVERSION = lambda kind, _: kind == "TextualInversion"  # noqa: E731
NO_ADAPTER = lambda kind, _: kind not in {"LoRA", "DreamBooth"}  # noqa: E731
NO_BOOTH = lambda kind, _: "DreamBooth" not in kind  # noqa: E731
NO_TUNING = lambda kind, _: kind != "FineTune"  # noqa: E731
NO_WORD = lambda kind, _: kind != "TextualInversion"  # noqa: E731
NOT_TEXT = lambda kind, family: family == "UNet2D" or kind == "TextualInversion"  # noqa: E731
CROSS = lambda kind, family: kind != "FineTune" or family == "SD3"  # noqa: E731

TABLE = {
    "lora.rank": (4, NO_ADAPTER),
    "lora.alpha": (4, NO_ADAPTER),
    "lora.dropout": (0.1, NO_ADAPTER),
    "lora.targets": ("Attention", NO_ADAPTER),
    "lora.useDora": (True, NO_ADAPTER),
    "dreamBooth.classPrompt": ("a dog", NO_BOOTH),
    "dreamBooth.priorLossWeight": (0.5, NO_BOOTH),
    "dreamBooth.classImages": (10, NO_BOOTH),
    "dreamBooth.adapter": ("None", NO_BOOTH),
    "fineTune.parts": ("Attention", NO_TUNING),
    "textualInversion.vectors": (2, NO_WORD),
    "model.family": ("Auto", NEVER),
    "model.vae": ("s3://models/vae/", WORDLESS),
    "model.textEncoder.source": ("s3://models/text/", WORDLESS),
    "model.textEncoder.train": (True, NOT_TEXT),
    "model.textEncoder.learningRate": (1e-6, NEVER),  # waits for train
    "dataset.source": ("s3://team-a/dogs/", NEVER),
    "dataset.concepts": ([{"source": "s3://team-a/a/"}, {"source": "s3://team-a/b/"}], NEVER),
    "dataset.concepts[].weight": ([{"source": "s3://team-a/a/", "weight": 2}], NEVER),
    "dataset.concepts[].prompt": ([{"source": "s3://team-a/a/", "prompt": "a dog"}], PROMPT_GIVEN),
    "dataset.concepts[].captionDropout": ([{"source": "s3://team-a/a/", "captionDropout": 0.3}], WORDLESS),
    "dataset.resolution": (256, NEVER),
    "dataset.buckets.enabled": (False, NEVER),
    "dataset.buckets.step": (32, NEVER),
    "dataset.buckets.maxShapes": (3, NEVER),
    "dataset.augmentation.horizontalFlip": (0, NEVER),
    "dataset.augmentation.crop": ("Random", NEVER),
    "dataset.augmentation.rotateDegrees": (3, NEVER),
    "dataset.augmentation.colorJitter": (0.1, NEVER),
    "dataset.augmentation.variantsPerImage": (4, NEVER),
    "dataset.captions.default": ("a dog", PROMPT_GIVEN),
    "dataset.captions.prefix": ("x ", WORDLESS),
    "dataset.captions.dropout": (0.2, WORDLESS),
    "dataset.captions.shuffleTags": (True, WORDLESS),
    "dataset.filters.minSide": (64, NEVER),
    "dataset.filters.maxAspectRatio": (2, NEVER),
    "dataset.filters.duplicates": ("Keep", NEVER),
    "dataset.filters.minSharpness": (10, NEVER),
    "dataset.filters.maxBadFraction": (0.5, NEVER),
    "dataset.validation.fraction": (0.1, NEVER),
    "training.maxSteps": (10, NEVER),
    "training.epochs": (2, NEVER),
    "training.batchSize": (6, NEVER),
    "training.microBatchSize": (2, NEVER),
    "training.learningRate": (1e-3, NEVER),
    "training.lrSchedule.name": ("Linear", NEVER),
    "training.lrSchedule.warmupSteps": (10, NEVER),
    "training.lrSchedule.cycles": (3, NEVER),  # waits for CosineWithRestarts
    "training.lrSchedule.power": (2, NEVER),  # waits for Polynomial
    "training.optimizer.name": ("Lion", NEVER),
    "training.optimizer.weightDecay": (0.1, INVERSION),
    "training.optimizer.beta1": (0.8, NEVER),
    "training.optimizer.beta2": (0.99, NEVER),
    "training.optimizer.epsilon": (1e-7, NEVER),
    "training.optimizer.maxGradNorm": (0.5, NEVER),
    "training.mixedPrecision": ("FP16", NEVER),
    "training.attention": ("XFormers", NEVER),
    "training.gradientCheckpointing": ("Always", NEVER),
    "training.ema.enabled": (True, NEVER),
    "training.ema.decay": (0.99, NEVER),  # waits for enabled
    "training.nonFinite.policy": ("RollBack", NEVER),
    "training.nonFinite.limit": (5, NEVER),
    "training.objective.predictionType": ("VPrediction", SD3),
    "training.objective.snrGamma": (3, SD3),
    "training.objective.noiseOffset": (0.05, NEVER),
    "training.objective.timestepSampling": ("LogitNormal", NEVER),
    "training.objective.shift": (2, NOT_SD3),
    "training.objective.zeroTerminalSNR": (True, SD3),
    "training.seed": (1, NEVER),
    "training.deterministic": (True, NEVER),
    "validation.everySteps": (10, NEVER),
    "validation.maxImages": (8, NEVER),
    "validation.prompts": ([{"prompt": "a dog"}], NEVER),
    "validation.prompts[].seed": ([{"prompt": "a dog", "seed": 3}], NEVER),
    "validation.prompts[].steps": ([{"prompt": "a dog", "steps": 3}], NEVER),
    "validation.prompts[].negativePrompt": ([{"prompt": "a dog", "negativePrompt": "blurry"}], WORDLESS),
    "validation.prompts[].guidanceScale": ([{"prompt": "a dog", "guidanceScale": 5}], WORDLESS),
    "validation.earlyStopping.patience": (2, NEVER),
    "validation.earlyStopping.minDelta": (0.01, NEVER),
    "validation.scores.images": (8, NEVER),
    "output.formats": (["Diffusers"], NEVER),
}
"""A value other than the default, and the combinations that refuse it."""
BESIDE = {
    "training.lrSchedule.cycles": {"training.lrSchedule.name": "CosineWithRestarts"},
    "training.lrSchedule.power": {"training.lrSchedule.name": "Polynomial"},
    "training.ema.decay": {"training.ema.enabled": True},
    "validation.scores.images": {"validation.scores.model": "s3://models/clip/"},
    "dreamBooth.classPrompt": {"dreamBooth.instancePrompt": "a"},
    "dreamBooth.priorLossWeight": {"dreamBooth.instancePrompt": "a", "dreamBooth.classPrompt": "b"},
    "dreamBooth.classImages": {"dreamBooth.instancePrompt": "a", "dreamBooth.classPrompt": "b"},
    "dreamBooth.adapter": {"dreamBooth.instancePrompt": "a", "dreamBooth.classPrompt": "b"},
    "textualInversion.vectors": {"textualInversion.token": "<a>", "textualInversion.initializerToken": "a"},
}
"""What has to be there for a field to be looked at."""


def put(content, path, value):
    *sections, last = path.split("[]")[0].split(".")
    for section in sections:
        content = content.setdefault(section, {})
    content[last] = value


def job(kind, family, changes):
    content = {
        "method": kind.removeprefix("whole "),
        "model": {"source": "s3://models/x/", "family": family},
        "dataset": {"source": "s3://team-a/x/"},
        "output": {"destination": "s3://team-a/out/"},
        **{name: dict(section) for name, section in SECTIONS.get(kind, {}).items()},
    }
    for path, value in changes.items():
        put(content, path, value)
    if "concepts" in content["dataset"]:
        del content["dataset"]["source"]
    return content


def refused(kind, family, changes):
    """Return the reason, None where a job is accepted."""
    try:
        TrainerSpec.model_validate(job(kind, family, changes))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("kind", "family"), COMBINATIONS)
def test_each_field_is_honoured_or_refused(kind, family):
    assert refused(kind, family, {}) is None
    wrong = []
    for path, (value, refuses) in TABLE.items():
        reason = refused(kind, family, BESIDE.get(path, {}) | {path: value})
        if (reason is not None) != (refuses is not NEVER and refuses(kind, family)):
            wrong.append((path, reason))
        if reason is not None:
            assert path.split(".")[0] in reason, "the reason names the field"
    assert wrong == []


def test_every_field_stands_in_the_table():
    """But for what is bookkeeping, and decides neither what is trained nor what is seen of it."""
    sections = (
        "lora",
        "dreamBooth",
        "fineTune",
        "textualInversion",
        "model",
        "dataset",
        "training",
        "validation",
        "output",
    )
    limited = {limit.path for limit in LIMITS}
    fields = {path for path in optional(TrainerSpec) if path.startswith(tuple(f"{name}." for name in sections))}
    assert set(TABLE) == {path for path in fields - limited if not path.startswith("output.hub.")}


def attributes(folders):
    """Return the names of all attributes that code reads."""
    for file in itertools.chain.from_iterable(folder.rglob("*.py") for folder in folders):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                yield node.attr


def test_what_is_honoured_is_read():
    """By the trainer, or by a property of the contract that the trainer asks."""
    read = {*attributes([ROOT / "trainer" / "diffusion_trainer", ROOT / "crds" / "diffusion_api"])}
    snake = {"zeroTerminalSNR": "zero_terminal_snr", "beta1": "beta1", "beta2": "beta2"}
    names = {path.rpartition(".")[2] for path in TABLE}
    assert {name for name in names if snake.get(name, to_snake(name)) not in read} == set()


def test_a_default_is_no_wish():
    """The API server writes all defaults into a job: with them in it, every combination is accepted."""
    for kind, family in COMBINATIONS:
        made = TrainerSpec.model_validate(job(kind, family, {}))
        assert TrainerSpec.model_validate(made.model_dump(mode="json", by_alias=True)) == made
