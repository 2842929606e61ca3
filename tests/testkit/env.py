"""Make the Python environment that every make target uses, and print the path of its interpreter.

Runs on the bare Python of a fresh machine (standard library only). The environment lies outside the clone, keyed by
what is declared in pyproject.toml and by the Python version, so that clones share it and nothing is installed twice.
It holds the dependencies only: the project itself is found through PYTHONPATH (set by the Makefile), so that one
environment serves every clone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

EXTRAS = ("operator", "trainer", "optimizers", "metrics", "dev")
BARE_EXTRAS = ("single-file",)
"""Those of whose packages files are read and no code runs: installed without what they require themselves."""
ROOT = Path(__file__).resolve().parents[2]


def cache_root() -> Path:
    """Return the folder outside the clone in which everything slow is kept."""
    named = os.environ.get("DIFFUSION_OPERATOR_CACHE")
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else shared / "diffusion-operator"


def requirements() -> list[str]:
    """Return the declared requirements of every extra that the gates need."""
    return [*_project()["dependencies"], *_of(EXTRAS)]


def _of(extras: tuple[str, ...]) -> list[str]:
    return [one for extra in extras for one in _project()["optional-dependencies"][extra]]


def _project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def ensure() -> Path:
    """Return the interpreter of a complete environment, made now when it is missing."""
    wanted, bare = requirements(), _of(BARE_EXTRAS)
    key = hashlib.sha256("\n".join([*wanted, *bare, sys.version]).encode()).hexdigest()[:12]
    home = cache_root() / f"python-{key}"
    python = home / "bin" / "python"
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / "python.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            _build(home, wanted, bare)
    return python


def _build(home: Path, wanted: list[str], bare: list[str]) -> None:
    print(f"making the Python environment {home} (about 6 GB, once per machine)", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True, symlinks=True)
    python = str(home / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "uv>=0.9"], check=True, stdout=sys.stderr)
    # Everything is taken from the newest release: the lower bounds only keep the resolver from walking back years.
    install = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    subprocess.run([*install, *wanted], check=True, stdout=sys.stderr)
    subprocess.run([*install, "--no-deps", *bare], check=True, stdout=sys.stderr)
    (home / "complete").touch()


if __name__ == "__main__":
    print(ensure())
