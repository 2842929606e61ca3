"""`status` of a DiffusionTrainingJob. Conditions are the truth; `phase` is a summary for people that no code reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffusion_api.job import Phase
from diffusion_api.meta import ApiModel, Timestamp
from diffusion_api.resources import MAX_ALTERNATIVES, NodeCapacity

Text = Annotated[str, Field(max_length=1024)]

CONDITIONS = (
    "Validated",
    "PreflightPassed",
    "Admitted",
    "PodsReady",
    "Progressing",
    "Suspended",
    "Complete",
    "Failed",
)
MAX_ATTEMPTS = 10
MAX_LAST_LINES = 1024
MAX_EXCLUDED_NODES = 16
MAX_CHOICES = 2 * (1 + MAX_ALTERNATIVES)
"""Each with capacity Any is two."""


class Condition(ApiModel):
    """One aspect of the job's state, as in every Kubernetes object."""

    type: Annotated[str, Field(max_length=64)]
    """Which aspect."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(max_length=64)]
    """One CamelCase word."""
    message: Text
    """A sentence for people."""
    observed_generation: int = 0
    """Generation of the spec that this speaks of."""
    last_transition_time: Timestamp
    """When `status` last changed."""


class Pending(ApiModel):
    """Why it is not running."""

    cause: Annotated[str, Field(max_length=64)]
    """One CamelCase word."""
    detail: Text
    """What was seen."""
    hint: Text
    """What can be done."""
    since: Timestamp
    """Since when."""


class Progress(ApiModel):
    """How far it is, as last heard from the trainer."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps of the whole run."""
    epoch: int = 0
    """Passes over the dataset done."""
    percentage: int = 0
    """0 to 100."""
    done: Annotated[str, Field(max_length=16)] = ""
    """The percentage as shown by kubectl."""
    estimated_remaining_seconds: int | None = None
    """Estimate of the time left."""
    remaining: Annotated[str, Field(max_length=16)] = ""
    """The time left as shown by kubectl."""
    samples_per_second: float | None = None
    """Images per second."""
    loss: float | None = None
    """Training loss, averaged over the last report interval."""
    validation_loss: float | None = None
    """Loss on the held-out split at the last evaluation."""
    clip_score: float | None = None
    """CLIP score at the last evaluation, 0 to 100."""
    kid: float | None = None
    """Kernel distance of drawn and held-out pictures at the last evaluation, near 0 where they look alike."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    last_updated_time: Timestamp
    """When the trainer said so."""


class LatestCheckpoint(ApiModel):
    """The newest acknowledged checkpoint."""

    step: int
    """Optimizer step."""
    uri: Text
    """Where it is."""
    time: Timestamp
    """When it was acknowledged."""


class BestCheckpoint(ApiModel):
    """The checkpoint with the lowest validation loss."""

    step: int
    """Optimizer step."""
    metric: Annotated[str, Field(max_length=64)]
    """What it is best by."""
    value: float
    """The metric's value."""


class CheckpointStatus(ApiModel):
    """What would survive if everything stopped now."""

    latest: LatestCheckpoint | None = None
    """The newest acknowledged checkpoint."""
    best: BestCheckpoint | None = None
    """The best one so far."""
    at_risk_steps: int = 0
    """Steps that a loss of the node would repeat."""


class Attempt(ApiModel):
    """One start of all pods."""

    number: int
    """From 1."""
    started_at: Timestamp
    """When its pods were created."""
    ended_at: Timestamp | None = None
    """When it ended."""
    resumed_from_step: int | None = None
    """Step of the checkpoint that it started from."""
    reached_step: int | None = None
    """Last step that it was heard of."""
    nodes: Annotated[tuple[Annotated[str, Field(max_length=253)], ...], Field(max_length=64)] = ()
    """Nodes of its pods."""
    profile: Annotated[str, Field(max_length=253)] = ""
    """Profile that it used."""
    capacity: Annotated[str, Field(max_length=16)] = ""
    """Spot or OnDemand."""
    cause: Annotated[str, Field(max_length=64)] | None = None
    """Why it ended; docs/reference/causes.md."""
    exit_code: int | None = None
    """Exit code of the trainer."""
    gpu_seconds: float = 0
    """GPU-seconds that its pods held, so far."""
    message: Text = ""
    """What happened and what to do."""
    last_lines: Annotated[str, Field(max_length=MAX_LAST_LINES)] = ""
    """End of the trainer's log."""
    log: Annotated[str, Field(max_length=1024)] | None = None
    """Folder in the bucket with the whole logs, after a failure: at most the last 256 KiB of each process."""


class Counters(ApiModel):
    """How often what happened."""

    restarts: int = 0
    """Attempts after the first."""
    failures: int = 0
    """Failures over the whole run."""
    failures_since_checkpoint: int = 0
    """Failures since an attempt last committed a new checkpoint; these count towards backoffLimit."""
    preemptions: int = 0
    """Endings by preemption: free, and never waited for."""
    infrastructure: int = 0
    """Endings by infrastructure since the last new checkpoint: retried with backoff under a budget of their own."""
    out_of_memory_retunes: int = 0
    """Times the micro-batch was made smaller."""


class Accounting(ApiModel):
    """What it cost."""

    gpu_seconds: float = 0
    """GPU-seconds over all attempts, the running one included."""
    useful_gpu_seconds: float = 0
    """GPU-seconds of ended attempts that went into steps that were kept."""
    lost_gpu_seconds: float = 0
    """GPU-seconds of work that had to be repeated."""
    goodput: float | None = None
    """Share of GPU time that went into steps that were kept, as of the end of the last attempt."""
    costs: Annotated[dict[str, float], Field(max_length=8)] = Field(default_factory=dict)
    """Cost by currency, from the price of the profile and capacity that each attempt used."""
    estimated_cost: Annotated[str, Field(max_length=128)] | None = None
    """The same as shown."""


class ExcludedNode(ApiModel):
    """A node that the job's attempts avoid for a while."""

    node: Annotated[str, Field(max_length=253)]
    """Its name."""
    until: Timestamp
    """Attempts that start later may use it again."""
    reason: Annotated[str, Field(max_length=64)]
    """Cause of the attempt that failed there."""


class Placement(ApiModel):
    """Which of the choices in spec.resources is in use, and why."""

    profile: Annotated[str, Field(max_length=253)]
    """Name of the TrainingProfile."""
    capacity: NodeCapacity
    """Kind of node."""
    since: Timestamp
    """Since when this choice is in use."""
    waits_since: Timestamp
    """When the job began to wait for nodes, over all choices that were tried since it last ran."""
    reason: Literal["First", "NoCapacity", "Preempted", "Again"]
    """Why this one: the first of spec.resources; others had no nodes, or their nodes were taken away again and again;
    or one that had been given up is tried again."""
    message: Text = ""
    """The same in words."""
    retunes: int = 0
    """Times the micro-batch was made smaller on this profile's GPU."""


class UnavailableChoice(ApiModel):
    """A profile and capacity that attempts pass over for a while."""

    profile: Annotated[str, Field(max_length=253)]
    """Name of the TrainingProfile."""
    capacity: NodeCapacity
    """Kind of node."""
    until: Timestamp
    """Attempts that start later may use it again."""
    reason: Annotated[str, Field(max_length=64)]
    """NoCapacity or Preempted."""


class OutputFile(ApiModel):
    """One exported file."""

    name: Annotated[str, Field(max_length=253)]
    """Path below the destination."""
    sha256: Annotated[str, Field(max_length=64)]
    """Hash of its content."""
    bytes: int
    """Size."""


class OutputStatus(ApiModel):
    """What was exported."""

    uri: Text
    """The destination."""
    files: Annotated[tuple[OutputFile, ...], Field(max_length=16)] = ()
    """Exported weights."""


class JobStatus(ApiModel):
    """What the operator says of a job. Under 8 KiB."""

    observed_generation: int = 0
    """Generation of the spec that this status speaks of."""
    phase: Phase = "Pending"
    """Summary for people."""
    message: Text = ""
    """One sentence: what is going on."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = ()
    """The truth."""
    start_time: Timestamp | None = None
    """When work on it began; runPolicy.activeDeadlineSeconds counts from here. Anew when a suspended job resumes."""
    pending: Pending | None = None
    """Why it is not running."""
    progress: Progress | None = None
    """How far it is."""
    checkpoint: CheckpointStatus | None = None
    """What would survive."""
    gpus: int = 0
    """GPUs that the job asks for, over all nodes."""
    attempt: int = 0
    """Number of the current or last attempt; written before its pods are created."""
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=MAX_ATTEMPTS)] = ()
    """Newest first."""
    workload: Annotated[str, Field(max_length=63)] | None = None
    """Name of its Kueue Workload, its place in the queue; kept over attempts. None where it asks for no queue."""
    next_attempt_at: Timestamp | None = None
    """When the next attempt may start, while a backoff runs."""
    micro_batch_size: int | None = None
    """Bound on the micro-batch, after a larger one did not fit."""
    architecture: Annotated[str, Field(max_length=64)] | None = None
    """Published network that the preflight found the base model to be; docs/reference/memory.md."""
    excluded_nodes: Annotated[tuple[ExcludedNode, ...], Field(max_length=MAX_EXCLUDED_NODES)] = ()
    """Nodes that attempts avoid because one failed there."""
    counters: Counters = Counters()
    """How often what happened."""
    accounting: Accounting | None = None
    """What it cost."""
    placement: Placement | None = None
    """Which of the choices in spec.resources is in use, and why."""
    unavailable: Annotated[tuple[UnavailableChoice, ...], Field(max_length=MAX_CHOICES)] = ()
    """Choices that attempts pass over for a while."""
    profiles: Annotated[dict[str, dict[str, object]], Field(max_length=1 + MAX_ALTERNATIVES)] | None = None
    """The profiles by name, as they were at the first attempt."""
    output: OutputStatus | None = None
    """What was exported."""
