"""What the trainer and the uploader's process tell each other. Plain values, pickled by a pipe of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_trainer.checkpoint.head import Entry, Lease
from diffusion_trainer.checkpoint.ledger import Retention
from diffusion_trainer.errors import TrainerError
from diffusion_trainer.objectstore import ObjectStore


@dataclass(frozen=True, slots=True)
class Target:
    """Where and as whom to publish. Picklable: `open_store` is e.g. `functools.partial(open_store, uri)`."""

    open_store: Callable[[], ObjectStore]
    lease: Lease
    run_spec_sha: str
    retention: Retention = field(default_factory=Retention)


@dataclass(frozen=True, slots=True)
class Job:
    """To the uploader: publish the files of these names in the staging folder, and leave them alone afterwards."""

    step: int
    folder: Path
    names: tuple[str, ...]
    best: tuple[str, float] | None


@dataclass(frozen=True, slots=True)
class Committed:
    """From the uploader: the job is acknowledged."""

    entry: Entry
    upload_seconds: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Failed:
    """From the uploader: the job (or opening the store) failed, and the uploader is ready for another."""

    error: TrainerError


@dataclass(frozen=True, slots=True)
class Warned:
    """From the uploader: something a person should know, that stops nothing."""

    text: str
