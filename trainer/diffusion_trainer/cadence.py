"""When a checkpoint is due. Pure: clocks and measurements are arguments."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MTBF_SECONDS = 2 * 3600.0
"""Mean time between preemptions while nobody has measured any: that of a bad spot market."""
SHORTEST_SECONDS, LONGEST_SECONDS = 60.0, 1800.0
UPLOAD_MARGIN = 1.2
GRACE_SHARE = 0.6
"""Share of what is left of the grace period that a last save may be predicted to take."""
UNMEASURED_BYTES_PER_SECOND = 50e6
"""Speed that is assumed of an upload before the first one was measured."""
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Cadence:
    """`checkpoint.interval`: a number of optimizer steps, a time in seconds, or neither (Auto)."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, interval: str) -> Cadence:
        """Return what `Auto`, `500steps`, `90s`, `10m` or `2h` says."""
        match = re.fullmatch(r"([1-9][0-9]*)(steps|s|m|h)", interval)
        if match is None:
            return cls()
        count, unit = int(match[1]), match[2]
        return cls(steps=count) if unit == "steps" else cls(seconds=count * _SECONDS[unit])

    def due(
        self, step: int, *, elapsed_seconds: float, stall_seconds: float | None, upload_seconds: float | None
    ) -> bool:
        """Return whether to save after `step`, `elapsed_seconds` after the last save (or the start).

        `stall_seconds` and `upload_seconds` are what the last save cost, None before the first.
        """
        if self.steps is not None:
            return step % self.steps == 0
        wanted = self.seconds or auto_seconds(stall_seconds=stall_seconds, upload_seconds=upload_seconds)
        return elapsed_seconds >= wanted


def auto_seconds(
    *, stall_seconds: float | None, upload_seconds: float | None, mtbf_seconds: float = MTBF_SECONDS
) -> float:
    """Return the interval that loses least: sqrt(2 MTBF stall) (Young 1974, Daly 2006), never below what uploads need.

    Before the first save nothing is measured; it is made after the shortest interval.
    """
    best = math.sqrt(2 * mtbf_seconds * (stall_seconds or 0.0))
    floor = UPLOAD_MARGIN * (upload_seconds or 0.0)
    return max(floor, min(LONGEST_SECONDS, max(SHORTEST_SECONDS, best)))


def fits_grace(*, seconds_left: float, upload_seconds: float | None, size_bytes: int) -> bool:
    """Return whether a save of `size_bytes`, begun now, is predicted to end well before the SIGKILL."""
    predicted = upload_seconds if upload_seconds is not None else size_bytes / UNMEASURED_BYTES_PER_SECOND
    return predicted <= GRACE_SHARE * seconds_left
