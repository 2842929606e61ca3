"""The edge: everything that the trainer reads from its environment, once, into a frozen value."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_api import names

ENV_METRICS_PORT = "DIFFUSION_METRICS_PORT"
"""Port of /progress and /metrics; 0 takes any free one and says which."""
ENV_LOADER_WORKERS = "DIFFUSION_LOADER_WORKERS"
"""Processes that prepare batches; results do not depend on it."""
MOST_LOADER_WORKERS = 4
LONGEST_SCRATCH = 64
"""Loader workers hand tensors over through sockets below TMPDIR, whose paths may have 107 characters; a longer one
makes them wait for each other for ever. The system's own folder for temporary files takes its place then."""


@dataclass(frozen=True)
class Failpoint:
    """A test hook, `<point>:<n>:kill[:<rank>]`: that process (rank 0) dies by SIGKILL right after point number n.

    Points: `step` (the update is done, nothing of it is saved) and `checkpoint` (it was handed to the uploader).
    """

    point: str
    number: int
    rank: int = 0

    def of(self, rank: int) -> Failpoint:
        """Return what is left of it for one process."""
        return self if rank == self.rank else Failpoint("", -1, rank)

    def hit(self, point: str, number: int) -> None:
        """Die here when this is the point."""
        if (point, number) == (self.point, self.number):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Settings:
    """Where the trainer finds things, and what only the machine decides."""

    run_file: Path
    credentials: Path
    work: Path
    termination_log: Path
    metrics_port: int
    loader_workers: int
    failpoint: Failpoint


@dataclass(frozen=True)
class Place:
    """Which of a job's training processes this one is, and where all of them meet."""

    rank: int
    world_size: int
    local_rank: int
    node: int
    host: str
    port: int


def read_place(environ: Mapping[str, str]) -> Place:
    """Return what torch's launcher told this process."""
    return Place(
        rank=int(environ["RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ["LOCAL_RANK"]),
        node=int(environ["GROUP_RANK"]),
        host=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
    )


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings in the environment. Raises ValueError naming a variable that cannot be read."""
    return Settings(
        run_file=Path(environ.get(names.ENV_RUN_FILE) or f"{names.RUN_DIR}/{names.RUN_FILE}"),
        credentials=Path(environ.get(names.ENV_CREDENTIALS_DIR) or names.CREDENTIALS_DIR),
        work=Path(environ.get(names.ENV_WORK_DIR) or names.WORK_DIR),
        termination_log=Path(environ.get(names.ENV_TERMINATION_LOG) or names.TERMINATION_LOG),
        metrics_port=_count(environ, ENV_METRICS_PORT, default=names.METRICS_PORT),
        loader_workers=_count(environ, ENV_LOADER_WORKERS, default=_default_workers()),
        failpoint=_failpoint(environ.get(names.ENV_FAILPOINT, "")),
    )


def settle(environ: MutableMapping[str, str], *, work: Path, deterministic: bool) -> None:
    """Point every library's scratch space below `work`, the only writable folder of a pod, and keep them offline.

    Must run before those libraries are imported. A writable HOME is left alone: on a user's own machine it holds the
    storage's credentials.
    """
    scratch = work / "scratch"
    for variable, folder in {
        **({"TMPDIR": "tmp"} if len(str(scratch)) <= LONGEST_SCRATCH else {}),
        "HF_HOME": "huggingface",
        "XDG_CACHE_HOME": "cache",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }.items():
        (scratch / folder).mkdir(parents=True, exist_ok=True)
        environ[variable] = str(scratch / folder)
    home = environ.get("HOME", "")
    if not home or not os.access(home, os.W_OK):
        environ["HOME"] = str(scratch)
    environ["HF_HUB_OFFLINE"] = "1"  # a model comes from where the job says, and from nowhere else
    environ["TQDM_DISABLE"] = "1"  # a log is no terminal
    if deterministic:
        environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts; without it GEMMs are not
    tempfile.tempdir = None  # read TMPDIR again


def _default_workers() -> int:
    return max(1, min(MOST_LOADER_WORKERS, len(os.sched_getaffinity(0)) - 1))


def _count(environ: Mapping[str, str], name: str, *, default: int) -> int:
    text = environ.get(name)
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name}={text}: write a number from 0 on")
    return int(text)


def _failpoint(text: str) -> Failpoint:
    if not text:
        return Failpoint("", -1)
    match = re.fullmatch(r"(step|checkpoint):(\d+):kill(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"{names.ENV_FAILPOINT}={text}: write step:<n>:kill[:<rank>] or checkpoint:..., or unset it")
    return Failpoint(match[1], int(match[2]), int(match[3] or 0))
