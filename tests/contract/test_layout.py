"""The places where `operator`, a folder of ours, could shadow the standard library's module. DESIGN section 3."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("crds", "operator", "trainer")
PACKAGES = ("crds/diffusion_api", "operator/diffusion_operator", "trainer/diffusion_trainer")


def tracked():
    """Return the files that git tracks or would track, so that build leftovers do not count."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def violations(files):
    """Return what is wrong with the layout, in words."""
    for file in files:
        if file.suffix != ".py":
            continue
        if len(file.parts) == 2 and file.parts[0] in SOURCE_ROOTS:
            yield f"{file}: a source root holds packages only"
        if file.name == "__init__.py" and file.parts[0] == "tests" and file.parts[1] != "testkit":
            yield f"{file}: no __init__.py under tests/ but in the testkit"
        if file.parts[0] in SOURCE_ROOTS or file.parts[:2] == ("tests", "testkit"):
            for name in (*file.parts[1:-1], file.stem):
                if name in sys.stdlib_module_names:
                    yield f"{file}: {name} is a module of the standard library"


def test_nothing_shadows_the_standard_library():
    assert list(violations(tracked())) == []


@pytest.mark.parametrize(
    "planted", ["operator/__init__.py", "tests/unit/operator/__init__.py", "operator/diffusion_operator/signal.py"]
)
def test_a_planted_violation_is_found(planted):
    assert list(violations([Path(planted)]))


@pytest.mark.parametrize("flags", [[], ["-S"], ["-I"]])
def test_the_standard_librarys_operator_wins_from_the_root(flags):
    script = "import operator, collections; print(operator.eq(1, 1))"
    ran = subprocess.run([sys.executable, *flags, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True"


def test_files_and_functions_stay_within_their_budgets():
    import ast

    over = []
    for file in tracked():
        if file.suffix != ".py":
            continue
        text = (ROOT / file).read_text()
        if text.count("\n") > 500:
            over.append(f"{file}: more than 500 lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > (120 if node.name == "train" else 80):
                    over.append(f"{file}:{node.lineno}: {node.name} has {length} lines")
    assert over == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed(package):
    assert (ROOT / package / "py.typed").exists()


def test_the_operator_needs_no_torch_and_the_light_commands_start_without_it():
    script = (
        "import sys, diffusion_operator.handlers; "
        "print([m for m in ('torch', 'diffusers', 'numpy', 'boto3') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
