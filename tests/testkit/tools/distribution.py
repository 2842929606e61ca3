"""Packages of the Linux distribution that the tools need: installed when we may, otherwise named with the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

# A package counts as present when its program is on the path; a library is asked of the package database.
_PROGRAMS = {
    "conntrack": "conntrack",
    "gcc": "gcc",
    "iproute2": "ip",
    "iptables": "iptables",
    "openssl": "openssl",
    "pkg-config": "pkg-config",
    "util-linux": "nsenter",
}


class MissingPackagesError(RuntimeError):
    """Something of the distribution is missing, and we may not install it. The message holds the command that does."""


def missing(packages: Sequence[str]) -> list[str]:
    """Return those of `packages` that this machine lacks."""
    return [package for package in packages if not _present(package)]


def require(packages: Sequence[str], *, purpose: str) -> None:
    """Install what is missing of `packages`; raise `MissingPackagesError` with one sentence where we may not."""
    lacking = missing(packages)
    if not lacking:
        return
    command = f"apt-get install -y {' '.join(lacking)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise MissingPackagesError(
            f"{purpose} needs {', '.join(lacking)}: run `sudo {command}` (or your system's equivalent)"
        )
    print(f"installing {', '.join(lacking)} for {purpose}", file=sys.stderr, flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=quiet, check=False, capture_output=True)
    done = subprocess.run(command.split(), env=quiet, check=False, capture_output=True, text=True)
    lacking = missing(packages)
    if lacking:
        raise MissingPackagesError(
            f"{purpose} needs {', '.join(lacking)}, and `{command}` failed:\n{done.stderr.strip()[-1000:]}"
        )


def _present(package: str) -> bool:
    program = _PROGRAMS.get(package)
    if program:
        return shutil.which(program) is not None or shutil.which(program, path="/usr/sbin:/sbin") is not None
    if package == "libseccomp-dev":
        # Asked of pkg-config, so that any distribution's package serves.
        asked = shutil.which("pkg-config")
        return asked is not None and subprocess.run([asked, "--exists", "libseccomp"], check=False).returncode == 0
    raise KeyError(f"no rule tells whether the package {package!r} is there: add one to {__name__}")
