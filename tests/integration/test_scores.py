"""Scores while real trainers train: every way from captions to pictures; what a trainer does without a CLIP model."""

import pytest

from diffusion_api.outcomes import ExitCode
from testkit.attempts import TrainerJob
from testkit.tiny import make_image_folder, make_tiny_clip
from testkit.tiny_families import make_tiny

pytestmark = pytest.mark.nightly

WAYS = {
    "no words": (
        "UNet2D",
        {"method": "Unconditional", "lora": None, "dataset": {"captions": {}}, "output": {"formats": ["Diffusers"]}},
    ),
    "tokens, with a new word": (
        "SD1",
        {
            "method": "TextualInversion",
            "lora": None,
            "textualInversion": {"token": "<it>", "initializerToken": "a"},
            "dataset": {"captions": {"prefix": "<it> "}},
        },
    ),
    "tokens of two encoders that learn": ("SDXL", {"model": {"textEncoder": {"train": True}}}),
    "embeddings, by flow": ("SD3", {}),
}


@pytest.fixture
def job_of(tmp_path, trainers):
    def make(way):
        family, sections = WAYS[way]
        make_tiny(family, tmp_path / "in" / "model")
        make_image_folder(tmp_path / "in" / "data", 9, sizes=((64, 64), (96, 64)))
        make_tiny_clip(tmp_path / "in" / "clip")
        job = TrainerJob(tmp_path, tmp_path / "in", trainers)
        spec = job.spec()
        for name, section in sections.items():
            spec[name] = spec.get(name, {}) | section if isinstance(section, dict) else section
        spec["dataset"]["validation"] = {"fraction": 0.4}
        scores = {"model": f"file://{tmp_path}/in/clip", "images": 3}
        spec["training"]["maxSteps"] = 4
        spec["validation"] = {"everySteps": 2, "prompts": [{"prompt": "a <it>", "steps": 2}], "scores": scores}
        job.overrides = spec
        return job

    return make


@pytest.mark.parametrize("way", WAYS)
def test_pictures_change_with_the_weights_and_so_do_scores(job_of, way):
    job = job_of(way)
    job.finish()
    lines = job.metrics()
    kids, scores = ([line[name] for line in lines if name in line] for name in ("kid", "clip_score"))
    assert len(set(kids)) == 2
    assert all(-1 < kid < 10 for kid in kids)
    assert len(set(scores)) == (0 if way == "no words" else 2)


def test_a_trainer_without_the_model_ends_before_the_first_step(job_of):
    job = job_of("embeddings, by flow")
    job.overrides["validation"]["scores"]["model"] += "/nothing"
    assert job.attempt() == ExitCode.INPUT_MISSING, job.log.read_text()
    assert "validation.scores.model" in job.last_word()["message"]
    assert "has no config.json" in job.last_word()["message"]
    assert "step" not in job.last_word()
