"""The examples run: each with a tiny model and a few images in place of what it names, for two steps."""

from pathlib import Path

import pytest
import yaml

from diffusion_api.validate import parse
from diffusion_trainer.output import CARD
from testkit.attempts import TrainerJob
from testkit.tiny import make_image_folder
from testkit.tiny_families import make_tiny

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "methods").glob("*.yaml"))
FOLDERS = ("data", "others", "ordinary")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_tiny("SD1", root / "model")
    make_tiny("UNet2D", root / "pixels")
    (root / "pixels" / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # from nothing
    for number, folder in enumerate(FOLDERS):
        make_image_folder(root / folder, 5, seed=number)
    return root


def made_tiny(spec, inputs, destination):
    """Return an example's spec with its inputs, its size, its length and its words changed, and nothing else."""
    model = "pixels" if spec["method"] == "Unconditional" else "model"
    spec["model"]["source"] = f"file://{inputs}/{model}"
    spec["dataset"] |= {"resolution": 64, "filters": {"minSide": 32}}
    for number, source in enumerate(spec["dataset"].get("concepts") or [spec["dataset"]]):
        source["source"] = f"file://{inputs}/{FOLDERS[number]}"
    spec["training"].pop("epochs", None)
    spec["training"] |= {"maxSteps": 2, "batchSize": 2}
    spec["validation"] |= {"everySteps": 2, "prompts": [p | {"steps": 2} for p in spec["validation"]["prompts"]]}
    if "dreamBooth" in spec:
        spec["dreamBooth"]["classImages"] = 2
    if "textualInversion" in spec:
        spec["textualInversion"]["initializerToken"] = "c"  # the tiny tokenizer knows letters only
    spec["output"]["destination"] = f"file://{destination}"
    return spec


@pytest.mark.nightly
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in EXAMPLES],
)
def test_an_example_runs(path, inputs, trainers, tmp_path):
    example = yaml.safe_load(path.read_text())
    formats = example["spec"]["output"]["formats"]
    assert parse(example)
    spec = {name: section for name, section in example["spec"].items() if name not in {"resources", "credentials"}}
    job = TrainerJob(tmp_path, inputs, trainers)
    made = made_tiny(spec, inputs, job.output)
    job.overrides = {"lora": None} | made
    job.finish()
    folders = {"Diffusers": "diffusers", "Kohya": "kohya", "SingleFile": "single-file"}
    for name in formats:
        assert list((job.output / folders[name]).glob("**/*.safetensors")), name
    assert "from_pretrained" in (job.output / CARD).read_text()
