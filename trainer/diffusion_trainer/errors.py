"""The trainer's errors: one tree, so that the supervisor can turn any ending into an exit code by class.

Every message names what was attempted, on what, and what to do about it. Errors of third parties are wrapped where
they enter (`raise ... from error`), so that no other module needs to know a library's exceptions. Every class takes
one message and nothing else: errors cross process borders by pickle.
"""


# ruff: noqa: N818 - the names say what happened; "Error" at the end of each would say nothing more
class TrainerError(Exception):
    """Base of everything the trainer raises on purpose."""


# --- storage -------------------------------------------------------------------------------------------------------


class StorageError(TrainerError):
    """An object store refused or could not do something."""


class InvalidUri(StorageError):
    """The URI (or the name of the bucket) cannot denote a store."""


class UnsupportedScheme(InvalidUri):
    """No backend serves the scheme of the URI."""


class InvalidKey(StorageError):
    """The key cannot name an object here: malformed, or it lies below another object."""


class NotFound(StorageError):
    """The object does not exist. Raised for 404 only: neither a refusal nor an outage is ever taken for absence."""


class BucketMissing(StorageError):
    """The bucket itself does not exist."""


class PermissionDenied(StorageError):
    """The store refused the credentials (401, 403, or none found)."""


class PreconditionFailed(StorageError):
    """A conditional write lost: the object exists already, or is no longer the one that was read (412)."""


class Conflict(StorageError):
    """The store kept answering that another write to the same key is under way (409), after retries."""


class StorageRejected(StorageError):
    """The store understood the request and refuses it for a reason of its own (other 4xx, 501)."""


class StorageUnavailable(StorageError):
    """The store did not answer usefully after retries: 5xx, timeouts, no connection, full or broken disk.

    The outcome of a write that ended like this is unknown: it may have been applied.
    """


# --- checkpoints ---------------------------------------------------------------------------------------------------


class CheckpointError(TrainerError):
    """The checkpoint protocol cannot go on."""


class Fenced(CheckpointError):
    """A newer attempt of the same job owns the checkpoints: this process is a zombie and must stop."""


class SpecChanged(CheckpointError):
    """The checkpoints at this place belong to a run with another spec."""


class CheckpointCorrupt(CheckpointError):
    """Checkpoints were published, but not one of them can be read back whole."""


class CheckpointUnsupported(CheckpointError):
    """The checkpoints, or the store they should go to, cannot be used by this version of the trainer."""


class UploaderDied(CheckpointError):
    """The process that uploads checkpoints ended before it was told to."""
