"""The Dockerfile against what the pods and the demo rely on. No engine runs here: its text is read instead."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from diffusion_api import names

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def stages():
    """Return {target: [(instruction, argument)]} with continued lines joined."""
    found = {}
    for line in re.sub(r"\\\n", " ", TEXT).splitlines():
        instruction, _, argument = line.partition(" ")
        if not instruction.isupper():
            continue
        if instruction == "FROM":
            current = found.setdefault(argument.split(" AS ")[1], [])
        current.append((instruction, argument))
    return found


def last(target, instruction):
    return [argument for name, argument in stages()[target] if name == instruction][-1]


@pytest.mark.parametrize(
    ("target", "user", "module"),
    [("operator", "65532", "diffusion_operator"), ("trainer", str(names.TRAINER_UID), "diffusion_trainer")],
)
def test_runs_its_package_as_pid_1_and_as_nobody(target, user, module):
    assert last(target, "USER") == f"{user}:{user}"
    assert json.loads(last(target, "ENTRYPOINT")) == ["python", "-m", module]


@pytest.mark.parametrize(
    ("target", "wanted"), [("operator", ["operator"]), ("trainer", ["trainer", "optimizers", "metrics", "cuda"])]
)
def test_installs_its_extras_and_no_others(target, wanted):
    extras = re.findall(r"--extra (\S+)", " ".join(argument for _, argument in stages()[f"{target}-build"]))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras == wanted
    assert set(wanted) <= set(declared)


def test_copies_only_what_exists():
    for stage in stages().values():
        for instruction, argument in stage:
            if instruction == "COPY" and "--from" not in argument:
                for source in argument.split()[:-1]:
                    assert (ROOT / source).exists(), source


def test_every_requirement_has_a_lower_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    assert [requirement for requirement in wanted if ">=" not in requirement] == []
