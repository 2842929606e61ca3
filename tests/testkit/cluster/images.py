"""Images without content: what containers run is the machine's own, seen read-only through the runtime's base spec.

An image is a layer of empty folders and a configuration, loaded in milliseconds; Python, its packages and the project's
code are never copied. Pure but for reading what is where on this machine, and writing the archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CODE = "/opt/diffusion-operator"
SOURCE_ROOTS = ("crds", "operator", "trainer", "cli")
REPOSITORY = Path(__file__).resolve().parents[3]
USER = 10001
_PROGRAMS = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ssl", "/etc/alternatives", "/etc/ld.so.cache")
_FOLDERS = (
    "bin",
    "dev",
    "etc",
    "lib",
    "lib64",
    "opt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "usr",
    "var",
)
_FILES = {
    # The users that images run as have no entry, as in images that name them by number: what cannot do without fails.
    "etc/passwd": "root:x:0:0:root:/:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, kw_only=True)
class Bind:
    """A file or folder of this machine that every container sees, read-only."""

    source: str
    target: str


@dataclass(frozen=True)
class Image:
    """A container image: only its configuration says anything."""

    name: str
    entrypoint: Sequence[str] = field(default=(), kw_only=True)
    env: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    user: str = field(default=str(USER), kw_only=True)
    workdir: str = field(default="/", kw_only=True)
    # Programs that are in the layer after all: name in the root folder -> file.
    programs: Mapping[str, Path] = field(default_factory=dict, kw_only=True)

    @property
    def reference(self) -> str:
        """The full name, as the kubelet asks for it."""
        return normalised(self.name)


def normalised(name: str) -> str:
    """Return the full reference of an image name, as Docker and the kubelet complete it."""
    first, slash, _ = name.partition("/")
    if not slash:
        name = f"library/{name}"
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        name = f"docker.io/{name}"
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def machine_binds(extra: Sequence[Bind] = ()) -> list[Bind]:
    """Return what every container sees: system programs, this Python with its packages, and the project's code."""
    wanted = [Bind(source=path, target=path) for path in (*_PROGRAMS, sys.base_prefix, sys.prefix)]
    wanted += [Bind(source=str(REPOSITORY / root), target=f"{CODE}/{root}") for root in SOURCE_ROOTS]
    chosen: list[Bind] = []
    for bind in [*wanted, *extra]:
        # What lies within another bind is seen through it; a second mount there has no place to go.
        inside = any(Path(bind.target).is_relative_to(other.target) for other in chosen)
        if Path(bind.source).exists() and not inside:
            chosen.append(bind)
    return chosen


def python_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment in which `python -m diffusion_operator` works inside a container."""
    return {
        "PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": ":".join(f"{CODE}/{root}" for root in SOURCE_ROOTS),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        "HOME": "/tmp",
        **(extra or {}),
    }


def base_spec(spec: Mapping[str, Any], *, binds: Sequence[Bind]) -> dict[str, Any]:
    """Return the runtime's default container spec with the binds added."""
    mounts = [
        {"destination": b.target, "type": "bind", "source": b.source, "options": ["rbind", "ro", "nosuid", "nodev"]}
        for b in binds
    ]
    # Limits may only be raised with a capability that is missing in many sandboxes; without them ours are inherited.
    process = {key: value for key, value in spec["process"].items() if key != "rlimits"}
    return {**spec, "mounts": [*spec["mounts"], *mounts], "process": process}


def archive(image: Image) -> bytes:
    """Return the image as an archive that `ctr images import` and `docker load` take; reproducible."""
    layer = _layer(image)
    digest = hashlib.sha256(layer).hexdigest()
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "Entrypoint": list(image.entrypoint) or None,
            "Env": [f"{name}={value}" for name, value in sorted(image.env.items())],
            # Without an entry for the user the group would be root's.
            "User": image.user if ":" in image.user else f"{image.user}:{image.user}",
            "WorkingDir": image.workdir,
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [image.reference], "Layers": ["layer.tar"]}]
    files = {"manifest.json": json.dumps(manifest).encode(), "config.json": json.dumps(config).encode()}
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, content in {**files, "layer.tar": layer}.items():
            _add(tar, name, content)
    return whole.getvalue()


def _layer(image: Image) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for folder in (*_FOLDERS, image.workdir.strip("/")):
            for path in [*reversed(Path(folder).parents), Path(folder)]:
                if str(path) != ".":
                    _add(tar, str(path), None)
        for folder in ("tmp", "var/tmp"):
            _add(tar, folder, None, mode=0o1777)
        for name, text in _FILES.items():
            _add(tar, name, text.encode())
        for name, program in image.programs.items():
            _add(tar, name, program.read_bytes(), mode=0o755)
    return whole.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes | None, *, mode: int = 0) -> None:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
    entry.mode = mode or (0o755 if content is None else 0o644)
    entry.size = len(content or b"")
    tar.addfile(entry, io.BytesIO(content or b""))
