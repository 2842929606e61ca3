"""How an attempt can end, and what follows: one table of exit code <-> cause <-> action.

The trainer turns errors into exit codes with it, the operator turns evidence into causes and causes into actions.
The cluster's evidence outranks codes (`diffusion_operator.policies`); a code alone is the last resort.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """Exit codes of the trainer. Chosen apart from shells' and signals' codes (1, 2, 126 to 165)."""

    DONE = 0
    BAD_CONFIG = 64
    BAD_DATA = 65
    INPUT_MISSING = 66
    STORAGE_UNAVAILABLE = 69
    DIVERGED = 70
    YIELDED = 75
    NO_PERMISSION = 77
    CUDA_OUT_OF_MEMORY = 80
    COLLECTIVE_TIMEOUT = 81
    GPU_FAULT = 82
    HANG = 83
    FENCED = 84


class Cause(StrEnum):
    """Why an attempt ended."""

    COMPLETED = "Completed"
    BAD_CONFIG = "BadConfig"
    BAD_DATA = "BadData"
    INPUT_MISSING = "InputMissing"
    PERMISSION_DENIED = "PermissionDenied"
    DIVERGED = "Diverged"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    PREEMPTED = "Preempted"
    SUSPENDED = "Suspended"
    NODE_LOST = "NodeLost"
    NO_CAPACITY = "NoCapacity"
    CUDA_OUT_OF_MEMORY = "CudaOutOfMemory"
    COLLECTIVE_TIMEOUT = "CollectiveTimeout"
    GPU_FAULT = "GPUFault"
    HANG = "Hang"
    FENCED = "Fenced"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    EPHEMERAL_STORAGE = "EphemeralStorage"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    MOUNT_FAILED = "MountFailed"
    ADMISSION_REJECTED = "AdmissionRejected"
    CRASH = "Crash"
    REPEATED_CRASH = "RepeatedCrash"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    PENDING_DEADLINE_EXCEEDED = "PendingDeadlineExceeded"
    GPU_HOURS_EXCEEDED = "GPUHoursExceeded"


class Action(StrEnum):
    """What the operator does about an ended attempt."""

    SUCCEED = "Succeed"
    """The job is complete."""
    RESUME = "Resume"
    """A new attempt at once; nothing is counted as failure."""
    BACK_OFF = "BackOff"
    """A new attempt after a backoff, from the infrastructure's budget."""
    RETRY = "Retry"
    """A new attempt after a backoff, counted towards backoffLimit."""
    RETUNE = "Retune"
    """A new attempt at once with half the micro-batch and the same batch."""
    FAIL = "Fail"
    """The job fails: trying again cannot help."""
    IGNORE = "Ignore"
    """A newer attempt is in charge; nothing follows from this one."""


@dataclass(frozen=True)
class Outcome:
    """One row of the table."""

    cause: Cause
    action: Action
    exit_code: ExitCode | None
    """Code of the trainer that alone proves the cause, None where only the cluster's evidence does."""
    explanation: str
    """What it means, for a person."""
    remedy: str
    """What the person can do; empty where nothing is to be done."""


INFRASTRUCTURE_BUDGET = 10
"""Endings with action BackOff, without a new checkpoint between them, after which the job fails."""
SHORT_OF_ROOM = (Cause.HOST_OUT_OF_MEMORY, Cause.EPHEMERAL_STORAGE)
SHORT_OF_ROOM_BUDGET = 1
"""Retries of an attempt that ran out of memory or disk; what did not suffice rarely does the second time."""
HANG_BUDGET = 3
"""Hangs at one step after which the job fails: that step is at fault, and not the machine."""
RETUNE_BUDGET = 4
"""Halvings of the micro-batch."""

OUTCOMES: tuple[Outcome, ...] = (
    Outcome(Cause.COMPLETED, Action.SUCCEED, ExitCode.DONE, "all steps are done and the weights are exported", ""),
    Outcome(
        Cause.BAD_CONFIG,
        Action.FAIL,
        ExitCode.BAD_CONFIG,
        "the job asks for something that cannot be trained",
        "mend the named field and create the job again",
    ),
    Outcome(
        Cause.BAD_DATA,
        Action.FAIL,
        ExitCode.BAD_DATA,
        "the dataset, the model or a checkpoint cannot be used",
        "mend the named file and create the job again",
    ),
    Outcome(
        Cause.INPUT_MISSING,
        Action.FAIL,
        ExitCode.INPUT_MISSING,
        "a bucket, folder or file does not exist",
        "correct the named location, or put the file there",
    ),
    Outcome(
        Cause.PERMISSION_DENIED,
        Action.FAIL,
        ExitCode.NO_PERMISSION,
        "the storage refused the credentials",
        "correct the Secret or the service account's rights",
    ),
    Outcome(
        Cause.DIVERGED,
        Action.FAIL,
        ExitCode.DIVERGED,
        "the loss is no longer a finite number",
        "lower training.learningRate, or use mixedPrecision BF16",
    ),
    Outcome(
        Cause.STORAGE_UNAVAILABLE,
        Action.BACK_OFF,
        ExitCode.STORAGE_UNAVAILABLE,
        "the storage did not answer, or answered with errors of its own",
        "it is tried again; look at the storage's status if it lasts",
    ),
    Outcome(Cause.PREEMPTED, Action.RESUME, ExitCode.YIELDED, "the pod was told to make room", ""),
    Outcome(
        Cause.SUSPENDED,
        Action.RESUME,
        None,
        "the job was suspended by its user",
        "set spec.suspend: false to go on",
    ),
    Outcome(Cause.NODE_LOST, Action.RESUME, None, "the node stopped answering or is gone", ""),
    Outcome(
        Cause.NO_CAPACITY,
        Action.RESUME,
        None,
        "no node came in time for the profile and capacity that were tried",
        "the next of resources.alternatives is tried at once",
    ),
    Outcome(
        Cause.CUDA_OUT_OF_MEMORY,
        Action.RETUNE,
        ExitCode.CUDA_OUT_OF_MEMORY,
        "the micro-batch does not fit into the GPU's memory",
        "at micro-batch 1: lower dataset.resolution, set gradientCheckpointing: Always, or use a larger GPU",
    ),
    Outcome(
        Cause.COLLECTIVE_TIMEOUT,
        Action.BACK_OFF,
        ExitCode.COLLECTIVE_TIMEOUT,
        "the training processes lost each other",
        "it is tried again; look at the network between the nodes if it lasts",
    ),
    Outcome(
        Cause.GPU_FAULT,
        Action.BACK_OFF,
        ExitCode.GPU_FAULT,
        "the GPU is missing or broken",
        "it is tried again; look at the node's GPU if it lasts",
    ),
    Outcome(
        Cause.HANG,
        Action.BACK_OFF,
        ExitCode.HANG,
        "there was no progress for runPolicy.stallSeconds",
        "it is tried again; raise runPolicy.stallSeconds if a step may really take that long",
    ),
    Outcome(Cause.FENCED, Action.IGNORE, ExitCode.FENCED, "a newer attempt has taken over", ""),
    Outcome(
        Cause.HOST_OUT_OF_MEMORY,
        Action.RETRY,
        None,
        "the pod used more memory than it may",
        "use a profile with more memory per GPU, or a smaller dataset.resolution",
    ),
    Outcome(
        Cause.EPHEMERAL_STORAGE,
        Action.RETRY,
        None,
        "the pod used more local disk than it may",
        "use a profile with more ephemeralStorage per GPU",
    ),
    Outcome(
        Cause.IMAGE_PULL_FAILED,
        Action.BACK_OFF,
        None,
        "the trainer's image cannot be pulled",
        "check the profile's image and podOverrides.imagePullSecrets",
    ),
    Outcome(
        Cause.MOUNT_FAILED,
        Action.BACK_OFF,
        None,
        "a volume of the pod cannot be mounted",
        "create the Secret or volume that the message names",
    ),
    Outcome(
        Cause.ADMISSION_REJECTED,
        Action.BACK_OFF,
        None,
        "the node or the API server refused the pod",
        "the message names what was refused",
    ),
    Outcome(
        Cause.CRASH,
        Action.RETRY,
        None,
        "the trainer ended unexpectedly",
        "read lastLines; it is tried again until runPolicy.backoffLimit",
    ),
    Outcome(
        Cause.REPEATED_CRASH,
        Action.FAIL,
        None,
        "the trainer ended in the same way at the same step twice",
        "read lastLines; trying again cannot help",
    ),
    Outcome(
        Cause.DEADLINE_EXCEEDED,
        Action.FAIL,
        None,
        "the job was not done within runPolicy.activeDeadlineSeconds",
        "create it again with a longer deadline or fewer steps",
    ),
    Outcome(
        Cause.PENDING_DEADLINE_EXCEEDED,
        Action.FAIL,
        None,
        "the pods did not run within runPolicy.pendingDeadlineSeconds",
        "do what the message says about what they waited for, and create the job again",
    ),
    Outcome(
        Cause.GPU_HOURS_EXCEEDED,
        Action.FAIL,
        None,
        "the job used up its GPU-hours (runPolicy.maxGPUHours, or limits.maxGPUHours of its profile)",
        "create it again with more GPU-hours or fewer steps",
    ),
)

OF_CAUSE: dict[Cause, Outcome] = {outcome.cause: outcome for outcome in OUTCOMES}
OF_CODE: dict[int, Outcome] = {int(outcome.exit_code): outcome for outcome in OUTCOMES if outcome.exit_code is not None}
