"""Each extra, installed alone from the built wheel, starts; what must not come with it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "uv", "build", "--wheel", "--quiet", "--out-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize(
    ("extra", "module", "absent"),
    [
        ("operator", "diffusion_operator", ["torch", "diffusers", "boto3"]),
        ("trainer", "diffusion_trainer", ["kopf", "kubernetes"]),
    ],
)
def test_an_extra_alone_starts(wheel, tmp_path, extra, module, absent):
    home = tmp_path / "venv"
    python = str(home / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(home)], check=True, timeout=60)
    requirement = f"diffusion-operator[{extra}] @ {wheel.as_uri()}"
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, requirement], check=True, timeout=280)
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    ran = subprocess.run(
        [python, "-m", module, "--help"], env=clean, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "usage:" in ran.stdout.lower()
    script = f"import importlib.util as u; print([m for m in {absent} if u.find_spec(m)])"
    ran = subprocess.run([python, "-c", script], env=clean, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
