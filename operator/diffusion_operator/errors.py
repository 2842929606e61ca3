"""The operator's errors.

OperatorError
├── SettingsError         configuration of the operator itself; it does not start
└── ClusterError          the API server did not do what was asked
    ├── NotFoundError     404
    ├── ConflictError     409: somebody else wrote the object first
    ├── ExistsError       409: an object of that name exists
    ├── RefusedError      other 4xx: asking again without a change is useless, asking later may help (quota)
    └── UnavailableError  429, 5xx, timeouts, broken connections: asking again helps
"""

from __future__ import annotations


class OperatorError(Exception):
    """Base of everything that this package raises on purpose."""


class SettingsError(OperatorError):
    """An environment variable that cannot be used; the message names it, its value and a remedy."""


class ClusterError(OperatorError):
    """The API server did not do what was asked."""


class NotFoundError(ClusterError):
    """The object does not exist."""


class ConflictError(ClusterError):
    """The object was changed by somebody else since it was read."""


class ExistsError(ClusterError):
    """An object of that name exists already."""


class RefusedError(ClusterError):
    """The API server understood and refused: quota, Pod Security, RBAC, an invalid object."""


class UnavailableError(ClusterError):
    """The API server did not answer, or asked to come back later."""

    def __init__(self, message: str, *, retry_after_seconds: float = 0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
