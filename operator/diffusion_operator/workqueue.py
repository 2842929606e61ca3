"""A queue of keys with the rules of client-go: one worker per key, no key twice, backoff per key.

A key that is added while it is worked on is worked on once more afterwards, so no change is missed and none is worked
on twice at the same time.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Handle(Protocol):
    """Something scheduled that can be called off."""

    def cancel(self) -> None:
        """Call it off."""


Schedule = Callable[[float, Callable[[], None]], Handle]
"""(seconds, what) -> handle: an event loop's `call_later`."""

FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 60.0


class WorkQueue:
    """Keys that wait for a worker."""

    def __init__(self, *, schedule: Schedule | None = None, jitter: Callable[[], float] = random.random) -> None:
        self._schedule = schedule
        self._jitter = jitter
        self._waiting: deque[str] = deque()
        self._dirty: set[str] = set()
        self._processing: set[str] = set()
        self._timers: dict[str, tuple[Handle, float]] = {}
        self._failures: dict[str, int] = {}
        self._available = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: str) -> None:
        """Have the key worked on as soon as a worker is free."""
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._processing:
            self._push(key)

    def add_after(self, key: str, seconds: float) -> None:
        """Have the key worked on after a while. A key has one timer: the sooner of two stays."""
        timer = self._timers.get(key)
        due = self._time() + seconds
        if timer is not None:
            if timer[1] <= due:
                return
            timer[0].cancel()
        schedule = self._schedule or asyncio.get_running_loop().call_later
        self._timers[key] = (schedule(seconds, lambda: self._fire(key)), due)

    def add_failed(self, key: str, *, at_least_seconds: float = 0) -> float:
        """Have the key worked on again after its backoff, which grows with each failure; return the seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        backoff = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 20))
        # Between half and all of it, so that keys that failed together do not come back together.
        seconds = max(at_least_seconds, backoff * (0.5 + self._jitter() / 2))
        self.add_after(key, seconds)
        return seconds

    def forgive(self, key: str) -> None:
        """Forget the key's failures."""
        self._failures.pop(key, None)

    def drop(self, key: str) -> None:
        """Forget everything about a key that is gone for good."""
        self.forgive(key)
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer[0].cancel()

    async def get(self) -> str:
        """Return the next key, which is this worker's until `done`."""
        while not self._waiting:
            self._available.clear()
            await self._available.wait()
        key = self._waiting.popleft()
        self._dirty.discard(key)
        self._processing.add(key)
        return key

    def done(self, key: str) -> None:
        """Give the key back; it is queued again if it was added meanwhile."""
        self._processing.discard(key)
        if key in self._dirty:
            self._push(key)

    def _push(self, key: str) -> None:
        self._waiting.append(key)
        self._available.set()

    def _fire(self, key: str) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _time(self) -> float:
        return float(asyncio.get_running_loop().time()) if self._schedule is None else 0.0
