"""The trainer's errors: one tree, so that the supervisor can turn any ending into an exit code by class.

Every message names what was attempted, on what, and what to do about it. Errors of third parties are wrapped where
they enter (`raise ... from error`), so that no other module needs to know a library's exceptions. Every class takes
one message and nothing else: errors cross process borders by pickle.

`exit_code` is what the process ends with (`diffusion_api.outcomes`); None is a crash, which is tried again.
"""

from typing import ClassVar

from diffusion_api.outcomes import ExitCode


# ruff: noqa: N818 - the names say what happened; "Error" at the end of each would say nothing more
class TrainerError(Exception):
    """Base of everything the trainer raises on purpose."""

    exit_code: ClassVar[ExitCode | None] = None


# --- what the user gave, and what became of it ---------------------------------------------------------------------


class BadConfig(TrainerError):
    """The job asks for something that cannot be trained. Names field, value and remedy."""

    exit_code = ExitCode.BAD_CONFIG


class BadData(TrainerError):
    """The dataset or the model cannot be used. Names the file and what to do about it."""

    exit_code = ExitCode.BAD_DATA


class InputMissing(TrainerError):
    """A folder or file that the job names does not exist."""

    exit_code = ExitCode.INPUT_MISSING


class Diverged(TrainerError):
    """The loss is no finite number any more. Names the step and the images of its batch."""

    exit_code = ExitCode.DIVERGED


# --- the machine ---------------------------------------------------------------------------------------------------


class GpuFault(TrainerError):
    """The GPU is missing or broken. Training never goes on without it."""

    exit_code = ExitCode.GPU_FAULT


class GpuOutOfMemory(TrainerError):
    """The micro-batch does not fit into the GPU's memory."""

    exit_code = ExitCode.CUDA_OUT_OF_MEMORY


# --- the other processes -------------------------------------------------------------------------------------------


class PeerLost(TrainerError):
    """Another training process of the job is gone or cannot be reached. Mostly a consequence: its own end says why."""

    exit_code = ExitCode.COLLECTIVE_TIMEOUT


class PeersDiffer(TrainerError):
    """The training processes of the job do not begin with the same numbers."""

    exit_code = ExitCode.BAD_CONFIG


# --- storage -------------------------------------------------------------------------------------------------------


class StorageError(TrainerError):
    """An object store refused or could not do something."""


class InvalidUri(StorageError):
    """The URI (or the name of the bucket) cannot denote a store."""

    exit_code = ExitCode.BAD_CONFIG


class UnsupportedScheme(InvalidUri):
    """No backend serves the scheme of the URI."""


class InvalidKey(StorageError):
    """The key cannot name an object here: malformed, or it lies below another object."""


class NotFound(StorageError):
    """The object does not exist. Raised for 404 only: neither a refusal nor an outage is ever taken for absence."""

    exit_code = ExitCode.INPUT_MISSING


class BucketMissing(StorageError):
    """The bucket itself does not exist."""

    exit_code = ExitCode.INPUT_MISSING


class PermissionDenied(StorageError):
    """The store refused the credentials (401, 403, or none found)."""

    exit_code = ExitCode.NO_PERMISSION


class PreconditionFailed(StorageError):
    """A conditional write lost: the object exists already, or is no longer the one that was read (412)."""

    exit_code = ExitCode.STORAGE_UNAVAILABLE


class Conflict(StorageError):
    """The store kept answering that another write to the same key is under way (409), after retries."""

    exit_code = ExitCode.STORAGE_UNAVAILABLE


class StorageRejected(StorageError):
    """The store understood the request and refuses it for a reason of its own (other 4xx, 501)."""

    exit_code = ExitCode.BAD_CONFIG


class StorageUnavailable(StorageError):
    """The store did not answer usefully after retries: 5xx, timeouts, no connection, full or broken disk.

    The outcome of a write that ended like this is unknown: it may have been applied.
    """

    exit_code = ExitCode.STORAGE_UNAVAILABLE


# --- checkpoints ---------------------------------------------------------------------------------------------------


class CheckpointError(TrainerError):
    """The checkpoint protocol cannot go on."""


class Fenced(CheckpointError):
    """A newer attempt of the same job owns the checkpoints: this process is a zombie and must stop."""

    exit_code = ExitCode.FENCED


class SpecChanged(CheckpointError):
    """The checkpoints at this place belong to a run with another spec."""

    exit_code = ExitCode.BAD_CONFIG


class CheckpointCorrupt(CheckpointError):
    """Checkpoints were published, but not one of them can be read back whole."""

    exit_code = ExitCode.BAD_DATA


class CheckpointUnsupported(CheckpointError):
    """The checkpoints, or the store they should go to, cannot be used by this version of the trainer."""

    exit_code = ExitCode.BAD_CONFIG


class UploaderDied(CheckpointError):
    """The process that uploads checkpoints ended before it was told to."""
