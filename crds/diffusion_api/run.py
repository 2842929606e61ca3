"""The wire: what the operator tells the trainer (RunConfig), and what it answers (ProgressReport, LastWord)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffusion_api.job import TrainerSpec
from diffusion_api.meta import ApiModel, Timestamp
from diffusion_api.status import BestCheckpoint, LatestCheckpoint, OutputFile, Progress

MAX_LAST_WORD_BYTES = 4096
"""The kubelet cuts a termination message here."""


class JobIdentity(ApiModel):
    """The job that a trainer works for."""

    name: str
    """Name of the job."""
    namespace: str
    """Its namespace."""
    uid: str
    """Its uid: the key of its checkpoints."""


class Rendezvous(ApiModel):
    """Where the pods of an attempt meet: rank 0's pod listens there."""

    host: str
    """A name of rank 0's pod that stays, whatever its address is."""
    port: Annotated[int, Field(ge=1, le=65535)]
    """Its port."""


class RunConfig(ApiModel):
    """Everything that one pod of one attempt needs to know. Travels as an annotation of that pod."""

    version: Literal[1] = 1
    """Version of this format."""
    job: JobIdentity
    """The job."""
    attempt: Annotated[int, Field(ge=1)]
    """Number of the attempt: the fencing token of its checkpoints."""
    node_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of this pod."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Pods of the attempt."""
    processes_per_node: Annotated[int, Field(ge=1)] = 1
    """Training processes in each pod, one per GPU."""
    rendezvous: Rendezvous | None = None
    """Where the pods meet; None for a single pod."""
    device: Literal["CUDA", "CPU"]
    """What to compute on."""
    micro_batch_size: int | None = None
    """Bound on the micro-batch that earlier attempts found; None where they found none."""
    grace_period_seconds: int = 120
    """Seconds between SIGTERM and SIGKILL."""
    stall_seconds: int = 900
    """Seconds without progress after which the trainer ends itself."""
    spec: TrainerSpec
    """The sections of the job that the trainer reads."""

    @model_validator(mode="after")
    def _pods_can_meet(self) -> Self:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError(f"{self.nodes} nodes need a rendezvous")
        if self.node_rank >= self.nodes:
            raise ValueError(f"nodeRank is {self.node_rank} of {self.nodes} nodes, and ranks begin with 0")
        return self

    @property
    def world_size(self) -> int:
        """Training processes over all pods."""
        return self.nodes * self.processes_per_node


class ProgressReport(ApiModel):
    """Answer of `/progress` on rank 0."""

    version: Literal[1] = 1
    """Version of this format."""
    attempt: int
    """Attempt that speaks."""
    stage: Literal["Preparing", "Running", "Exporting"]
    """What it is doing."""
    detail: Annotated[str, Field(max_length=256)] = ""
    """The same in words, e.g. `encoding images 120/400`."""
    progress: Progress | None = None
    """How far it is; None before the first step."""
    resumed_from_step: int | None = None
    """Step that this attempt started from."""
    latest_checkpoint: LatestCheckpoint | None = None
    """Newest acknowledged checkpoint."""
    best_checkpoint: BestCheckpoint | None = None
    """Best checkpoint so far."""
    warnings: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=8)] = ()
    """What a user should know, e.g. quarantined images."""
    idle_seconds: Annotated[float, Field(ge=0)] | None = None
    """Seconds since the training last gave a sign of life; None from trainers that do not say."""
    time: Timestamp
    """When this was true."""


class PreflightReport(ApiModel):
    """What a preflight found out."""

    family: str | None = None
    """Family of the model; None where it could not be told."""
    architecture: str | None = None
    """The published network that the model is, as in memory.py; None where it is another one."""
    images: int = 0
    """Images in the dataset, at least, where `complete` is false."""
    complete: bool = True
    """Whether the whole dataset was listed."""
    sampled: int = 0
    """Images that were decoded."""
    bytes: int = 0
    """Size of the listed images."""
    seconds: float = 0
    """How long it took."""


class LastWord(ApiModel):
    """Termination message of a pod: JSON of at most 4096 bytes."""

    version: Literal[1] = 1
    """Version of this format."""
    attempt: int
    """Attempt that speaks."""
    exit_code: int
    """Exit code; see outcomes.py."""
    message: Annotated[str, Field(max_length=1024)]
    """What happened, with field, value and remedy where the user can mend it."""
    step: int | None = None
    """Last optimizer step done."""
    resumed_from_step: int | None = None
    """Step that the attempt started from."""
    latest_checkpoint: LatestCheckpoint | None = None
    """Newest acknowledged checkpoint."""
    best_checkpoint: BestCheckpoint | None = None
    """Best checkpoint so far."""
    progress: Progress | None = None
    """How far it was."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Micro-batch that it trained with; None where it did not get so far."""
    output: Annotated[tuple[OutputFile, ...], Field(max_length=8)] = ()
    """Exported files, when done."""
    stopped_early_at: int | None = None
    """Step after which early stopping ended the training; None where it took all its steps."""
    preflight: PreflightReport | None = None
    """What a preflight, which is attempt 0, found out."""
    warnings: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=4)] = ()
    """What a user should know."""
    log: Annotated[str, Field(max_length=1024)] | None = None
    """Folder with the logs of a failed attempt's processes, where they could be put into the bucket."""
    last_lines: str = ""
    """End of the log; the first thing to be shortened."""

    def to_message(self) -> str:
        """Return the JSON text, shortened from last_lines, then warnings, then files, to what the kubelet keeps."""
        word = self
        while len(text := word.model_dump_json(by_alias=True, exclude_none=True).encode()) > MAX_LAST_WORD_BYTES:
            surplus = len(text) - MAX_LAST_WORD_BYTES
            if word.last_lines:
                # Escapes and multi-byte characters make a character cost up to twelve bytes; cut by characters until
                # it fits, at least one at a time.
                kept = word.last_lines[max(1, surplus // 12) :]
                word = word.model_copy(update={"last_lines": kept})
            elif word.warnings:
                word = word.model_copy(update={"warnings": word.warnings[:-1]})
            elif word.output:
                word = word.model_copy(update={"output": word.output[:-1]})
            else:
                word = word.model_copy(update={"message": word.message[: max(0, len(word.message) - 64)]})
        return text.decode()
