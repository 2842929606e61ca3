"""The guides name every field that a user may leave out of what decides a result."""

import re
from collections import Counter
from pathlib import Path

import pytest

from diffusion_api.job import TrainerSpec
from diffusion_api.supported import LIMITS
from testkit.fields import optional

GUIDES = "\n".join(path.read_text() for path in (Path(__file__).parents[2] / "docs" / "guides").glob("*.md"))
PROSE = re.sub(r"^```.*?^```", "", GUIDES, flags=re.MULTILINE | re.DOTALL)
CODE = [code.replace("[]", "") for code in re.findall(r"`([^`\n]+)`", PROSE)]
SECTIONS = ["training", "lora", "dreamBooth", "fineTune", "textualInversion", "dataset", "validation", "checkpoint"]


FIELDS = sorted(
    {path for path in optional(TrainerSpec) if path.split(".")[0] in SECTIONS} - {limit.path for limit in LIMITS}
)
LAST = Counter(path.rpartition(".")[2] for path in FIELDS)


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_is_named_in_a_guide(path):
    """By its name in code, with the section where another one has a field of that name."""
    *_, parent, name = path.split(".")
    wanted = name if LAST[name] == 1 else f"{parent.removesuffix('[]')}.{name}"
    assert any(re.search(rf"\b{re.escape(wanted)}\b", code) for code in CODE), wanted
