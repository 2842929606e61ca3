"""Builds the catalog's programs into the cache: each complete or absent, whoever else is building at the same time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from testkit.env import cache_root
from testkit.locking import exclusive
from testkit.tools import distribution, toolchain
from testkit.tools.catalog import TOOLS, Module, Tool


class ToolError(RuntimeError):
    """A program is unknown or did not build. The message says why and what to do."""


def binary(name: str) -> Path:
    """Return the program `name`, built now when it is missing."""
    return ensure([name])[name]


def ensure(names: Iterable[str]) -> dict[str, Path]:
    """Return the programs `names`, building what is missing, and nothing else. Raises `ToolError`."""
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in TOOLS]
    if unknown:
        raise ToolError(f"no such tool: {', '.join(unknown)}; there are {', '.join(sorted(TOOLS))}")
    found = {name: asset for name in wanted if (asset := _asset(name))}
    for module, tools in _by_module([TOOLS[name] for name in wanted if name not in found]).items():
        if not all(_target(tool).exists() for tool in tools):
            with exclusive(_home() / f"{module.folder}.lock"):
                _build(module, [tool for tool in tools if not _target(tool).exists()])
        found |= {tool.name: _target(tool) for tool in tools}
    return found


def source(name: str) -> Path:
    """Return the source of the module that the tool `name` is built from, at its pinned version: read-only.

    It lies in Go's module cache and is downloaded when it is not there: manifests come from here, and are not copied.
    Raises `ToolError`.
    """
    tool = TOOLS[name]
    go = _toolchain(tool.module)
    command = [str(go), "mod", "download", "-json", tool.source or tool.module.source]
    done = subprocess.run(
        command, cwd=tool.module.path, env=_environment(go), check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stdout + done.stderr).strip()[-600:]
        raise ToolError(
            f"the source of {name} {tool.version} could not be had (Go modules must be reachable): {reason}"
        )
    return Path(json.loads(done.stdout)["Dir"])


def _home() -> Path:
    return cache_root() / "tools"


def _target(tool: Tool) -> Path:
    return _home() / tool.key / tool.name


def _asset(name: str) -> Path | None:
    """Return what `KUBEBUILDER_ASSETS` offers under this name: envtest's folder of etcd, kube-apiserver and kubectl."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder or name not in {"etcd", "kube-apiserver", "kubectl"}:
        return None
    program = Path(folder) / name
    return program if os.access(program, os.X_OK) else None


def _by_module(tools: Sequence[Tool]) -> dict[Module, list[Tool]]:
    groups: dict[Module, list[Tool]] = {}
    for tool in tools:
        groups.setdefault(tool.module, []).append(tool)
    return groups


def _build(module: Module, tools: Sequence[Tool]) -> None:
    if not tools:  # another process built them while we waited for the lock
        return
    names = ", ".join(tool.name for tool in tools)
    if module.packages:
        try:
            distribution.require(module.packages, purpose=f"building {names}")
        except distribution.MissingPackagesError as error:
            raise ToolError(str(error)) from error
    go = _toolchain(module)
    print(f"building {names} from source (once per machine and version)", file=sys.stderr, flush=True)
    began = time.monotonic()
    partial = _home() / f".{module.folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for tool in tools:
        _compile(go, tool, partial / tool.name)
        # A folder of its own per program, renamed into place: what is there is complete.
        staged = partial / tool.key
        staged.mkdir()
        (partial / tool.name).rename(staged / tool.name)
        staged.rename(_home() / tool.key)
    shutil.rmtree(partial)
    print(f"built {names} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _toolchain(module: Module) -> Path:
    try:
        return toolchain.go(module.go_version())
    except toolchain.GoMissingError as error:
        raise ToolError(str(error)) from error


def _environment(go: Path) -> dict[str, str]:
    return os.environ | {
        # readonly: what is built is what go.sum says, or nothing. local: no other toolchain is downloaded in silence.
        "GOFLAGS": "-mod=readonly -buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "PATH": f"{go.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _compile(go: Path, tool: Tool, output: Path) -> None:
    module = tool.module
    command = [str(go), "build", "-o", str(output), "-ldflags", module.ldflags.format(version=tool.version)]
    if module.tags:
        command += ["-tags", module.tags]
    environment = _environment(go)
    if module.cgo is not None:
        environment["CGO_ENABLED"] = "1" if module.cgo else "0"
    done = subprocess.run(
        [*command, tool.package], cwd=module.path, env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("go: downloading")]
        raise ToolError(
            f"{tool.name} {tool.version} did not build in {module.path} (Go modules must be reachable on the first "
            f"build; a full disk shows here too):\n" + "\n".join(lines[-20:])
        )
