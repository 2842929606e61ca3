"""The jobs in examples/ are valid, and there is one for each method."""

from pathlib import Path

import pytest
import yaml

from diffusion_api.combinations import FAMILIES
from diffusion_api.validate import parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METHODS = sorted((EXAMPLES / "methods").glob("*.yaml"))


def job(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", [EXAMPLES / "minimal.yaml", *METHODS], ids=lambda path: path.stem)
def test_an_example_is_valid_and_named_after_its_file(path):
    content = job(path)
    assert parse(content)
    assert path.parent == EXAMPLES or content["metadata"]["name"] == path.stem


def test_every_method_has_an_example():
    assert {job(path)["spec"]["method"] for path in METHODS} == set(FAMILIES)
