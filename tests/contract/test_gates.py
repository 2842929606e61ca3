"""`make verify` fails when it should: each gate is shown a planted violation in a copy of the sources."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_api import generate

ROOT = Path(__file__).resolve().parents[2]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")


@pytest.fixture
def clone(tmp_path):
    """Return a copy of what the gates read."""
    for folder in ("crds", "operator", "trainer"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(clone, *command):
    environment = {"PYTHONPATH": "crds:operator:trainer", "PATH": "/usr/bin:/bin", "HOME": str(clone)}
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)


def test_generated_files_are_fresh(capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_generated_file_is_found_and_shown(tmp_path, capsys):
    generate.main(["--root", str(tmp_path)])
    crd = tmp_path / "crds" / "diffusiontrainingjobs.yaml"
    crd.write_text(crd.read_text().replace("LoRA is the place to start", "edited by hand"))
    assert generate.main(["--check", "--root", str(tmp_path)]) == 1
    assert "-" in (shown := capsys.readouterr().out)
    assert "edited by hand" in shown


def test_the_import_contracts_hold(clone):
    ran = run(clone, str(LINT_IMPORTS))
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("operator/diffusion_operator/decide.py", "import kopf"),
        ("operator/diffusion_operator/status.py", "import kubernetes"),
        ("operator/diffusion_operator/status.py", "import diffusion_operator.reconcile"),
        ("operator/diffusion_operator/state.py", "import diffusion_trainer"),
        ("crds/diffusion_api/names.py", "import torch"),
        ("trainer/diffusion_trainer/objective.py", "import diffusion_trainer.train"),
        ("trainer/diffusion_trainer/train.py", "import boto3"),
    ],
)
def test_a_forbidden_import_is_found(clone, module, line):
    with (clone / module).open("a") as file:
        file.write(f"\n{line}\n")
    ran = run(clone, str(LINT_IMPORTS))
    assert ran.returncode == 1, ran.stdout


def test_an_untyped_function_is_found(clone):
    (clone / "crds/diffusion_api/planted.py").write_text("def untyped(x):\n    return x\n")
    ran = run(clone, sys.executable, "-m", "mypy", "crds/diffusion_api/planted.py")
    assert ran.returncode == 1, ran.stdout
    assert "no-untyped-def" in ran.stdout


def test_make_verify_runs_every_gate():
    verify = (ROOT / "Makefile").read_text().split("\nverify:")[1].split("\n\n")[0]
    for gate in ("ruff format --check", "ruff check", "mypy", "lint-imports", "diffusion_api.generate --check"):
        assert gate in verify
