"""How a run is told to stop: SIGTERM becomes a flag between optimizer steps, and an exception everywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Yielded(BaseException):
    """The run was told to stop. No `Exception`: nothing that recovers from failures may swallow it."""


class StopSignal:
    """Set once by the signal handler, read by the main thread, which is the one that handlers run in."""

    def __init__(self, *, grace_seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.grace_seconds = grace_seconds
        self._monotonic = monotonic
        self._requested_at: float | None = None
        self._abrupt = False

    @property
    def requested(self) -> bool:
        """Return whether the run should stop."""
        return self._requested_at is not None

    @property
    def seconds_left(self) -> float:
        """Return what is left of the grace period, all of it while nobody asked."""
        if self._requested_at is None:
            return self.grace_seconds
        return max(0.0, self.grace_seconds - (self._monotonic() - self._requested_at))

    def request(self) -> None:
        """Ask for the stop; a second time changes nothing. Raises `Yielded` in a section that may be cut short."""
        if self._requested_at is not None:
            return
        self._requested_at = self._monotonic()
        if self._abrupt:
            raise Yielded

    @contextmanager
    def cut_short(self) -> Iterator[None]:
        """Mark a section that loses nothing by being left anywhere: preparation, evaluation, export."""
        before, self._abrupt = self._abrupt, True
        try:
            if self.requested:
                raise Yielded
            yield
        finally:
            self._abrupt = before
