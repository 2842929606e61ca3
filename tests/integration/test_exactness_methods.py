"""Whatever is trained: killed and resumed, a run ends with the weights it would have had anyway, bit for bit.

`test_exactness` does this for adapters at every step and in every way to be stopped; here methods are killed once,
and every method after each step in the nightly tests.
"""

import pytest
import torch

from testkit.attempts import TrainerJob
from testkit.tiny import make_image_folder
from testkit.tiny_families import make_tiny

STEPS = 5
KILLED = -9
TEXT = {"train": True, "learningRate": 1e-3}
BOOTH = {
    "method": "DreamBooth",
    "dreamBooth": {"instancePrompt": "a sks", "classPrompt": "a thing", "classImages": 3},
    "dataset": {"captions": {}},
}
METHODS = {
    "adapters that drop, with magnitudes and text": {
        "lora": {"rank": 4, "alpha": 4, "dropout": 0.3, "useDora": True},
        "model": {"textEncoder": TEXT},
        "output": {"formats": ["Diffusers", "Kohya", "SingleFile"]},
    },
    "everything, with text": {
        "method": "FineTune",
        "lora": None,
        "model": {"textEncoder": TEXT},
        "output": {"formats": ["Diffusers", "SingleFile"]},
    },
    "attention": {
        "method": "FineTune",
        "lora": None,
        "fineTune": {"parts": "Attention"},
        "output": {"formats": ["Diffusers"]},
    },
    "from scratch": {"method": "FromScratch", "lora": None, "output": {"formats": ["Diffusers"]}},
    "a word": {
        "method": "TextualInversion",
        "lora": None,
        "textualInversion": {"token": "<it>", "initializerToken": "a", "vectors": 2},
        "dataset": {"captions": {"prefix": "<it> "}},
        "output": {"formats": ["Diffusers", "Kohya"]},
    },
    "adapters on SDXL, with both text encoders": {
        "family": "SDXL",
        "model": {"textEncoder": TEXT},
        "output": {"formats": ["Diffusers", "Kohya"]},
    },
    "DreamBooth, everything, with class images": {
        **BOOTH,
        "dreamBooth": BOOTH["dreamBooth"] | {"adapter": "None"},
        "lora": None,
        "output": {"formats": ["Diffusers"]},
    },
    "DreamBooth, adapters, with class images and text": {
        **BOOTH,
        "model": {"textEncoder": TEXT},
        "output": {"formats": ["Kohya"]},
    },
    "without words": {
        "family": "UNet2D",
        "method": "Unconditional",
        "lora": None,
        "dataset": {"captions": {}},
        "validation": {"prompts": []},
        "output": {"formats": ["Diffusers"]},
    },
    "everything, with moments of 8 bits": {
        "method": "FineTune",
        "lora": None,
        "training": {"optimizer": {"name": "AdamW8bit"}},
        "output": {"formats": ["Diffusers"]},
    },
    "everything of SD3, by flow, with text": {
        "family": "SD3",
        "method": "FineTune",
        "lora": None,
        "model": {"textEncoder": TEXT},
        "dataset": {"captions": {"dropout": 0.5}},
        "output": {"formats": ["Diffusers", "SingleFile"]},
    },
    "adapters on SD3, with CLIP": {
        "family": "SD3",
        "model": {"textEncoder": TEXT},
        "dataset": {"captions": {"dropout": 0.5}},
        "output": {"formats": ["Diffusers", "Kohya"]},
    },
}
ALWAYS = list(METHODS)[:5]
"""These are killed once in every run of the tests, the others in the nightly ones only."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return what makes, once, a folder with a tiny model of a family and a few images of two shapes."""
    made = {}

    def of(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            make_tiny(family, root / "model")
            make_image_folder(root / "data", 9, sizes=((64, 64), (96, 64)))
            made[family] = root
        return made[family]

    return of


class Bench:
    """Undisturbed runs, each made once."""

    def __init__(self, root, inputs, trainers):
        self.root, self.inputs, self.trainers = root, inputs, trainers
        self._references = {}

    def job(self, name, folder):
        sections = dict(METHODS[name])
        job = TrainerJob(folder, self.inputs(sections.pop("family", "SD1")), self.trainers)
        spec = job.spec()
        job.overrides = {
            section: {**spec[section], **value} if isinstance(value, dict) and section in spec else value
            for section, value in sections.items()
        }
        job.overrides["training"] = {"maxSteps": STEPS} | sections.get("training", {})
        job.overrides["validation"] = {"everySteps": 3, "prompts": [{"prompt": "<it>", "steps": 2}]} | sections.get(
            "validation", {}
        )
        return job

    def reference(self, name):
        if name not in self._references:
            job = self.job(name, self.root / f"{len(self._references)}")
            job.finish()
            self._references[name] = result(job)
        return self._references[name]


@pytest.fixture(scope="module")
def bench(tmp_path_factory, inputs, trainers):
    return Bench(tmp_path_factory.mktemp("references"), inputs, trainers)


def result(job):
    """Return everything that a run leaves: tensors of its last checkpoint, and the bytes of what it exported."""
    snapshot = job.ledger().load()
    assert snapshot is not None
    assert snapshot.step == STEPS
    tensors = {f"{g}/{n}": t for g, group in snapshot.tensors.items() for n, t in group.items()}
    folders = [job.output / folder for folder in ("diffusers", "kohya", "single-file", "samples")]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return tensors, {str(path.relative_to(job.output)): path.read_bytes() for path in files}


def assert_same(job, reference):
    tensors, files = result(job)
    wanted, wanted_files = reference
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert files.keys() == wanted_files.keys()
    assert [name for name, content in wanted_files.items() if files[name] != content] == []


@pytest.mark.parametrize("name", ALWAYS)
def test_killed_and_resumed(bench, tmp_path, name):
    killed_and_resumed(bench, tmp_path, name, step=4)


@pytest.mark.nightly
@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("name", METHODS)
def test_killed_after_any_step(bench, tmp_path, name, step):
    killed_and_resumed(bench, tmp_path, name, step=step)


def killed_and_resumed(bench, folder, name, *, step):
    job = bench.job(name, folder)
    assert job.attempt(failpoint=f"step:{step}:kill") == KILLED, job.log.read_text()
    job.finish(workers=2)
    assert_same(job, bench.reference(name))
    moved = [n for n, t in bench.reference(name)[0].items() if n.startswith("optimizer/") and t.abs().max() > 0]
    assert moved


def test_masks_of_another_seed_are_found(bench, tmp_path):
    """Negative control: after the resume, adapters drop something else."""
    name = next(iter(METHODS))
    job = bench.job(name, tmp_path)
    assert job.attempt(failpoint="step:4:kill") == KILLED
    job.finish(seams=[("change_purpose", "adapter-dropout")])
    with pytest.raises(AssertionError):
        assert_same(job, bench.reference(name))
