"""Waiting for a condition, with a deadline. The only place in the tests where time is slept away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    probe: Callable[[], T],
    *,
    describe: str,
    timeout: float = 30,
    interval: float = 0.05,
    detail: Callable[[], str] | None = None,
) -> T:
    """Call `probe` until what it returns is true, and return that.

    Raises `TimeoutError` after `timeout` seconds; it says what was waited for, what was seen last, and `detail`.
    An exception of `probe` ends the wait: a condition that cannot come true any more should raise.
    """
    deadline = time.monotonic() + timeout
    pause = interval
    while True:
        seen = probe()
        if seen:
            return seen
        if time.monotonic() >= deadline:
            more = f"\n{detail()}" if detail else ""
            raise TimeoutError(f"waited {timeout:g} s for {describe}; last seen: {seen!r}{more}")
        time.sleep(pause)
        # Short at first, since most conditions are nearly true already; never longer than half a second.
        pause = min(pause * 1.3, 0.5)
