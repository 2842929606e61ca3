"""What is written down of the machine's cluster, so that another process can use or end what this one started.

The record lies at one place per machine, whatever cache its starter used, because there is one cluster per machine; it
says where the rest of the state is. That place is emptied when the machine starts anew, as everything else of the
cluster is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from testkit.env import cache_root

HOME = Path("/run/diffusion-operator-testkit")


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A process, told apart from a later one with the same number by the time at which it started."""

    pid: int
    started: int  # clock ticks since boot, as in /proc/PID/stat

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """Return the process with this number; None where there is none, or it has ended already."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The fields after the name: state is the first, start time the twentieth.
        return None if fields[0] in {"Z", "X"} else cls(pid=pid, started=int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether this very process runs."""
        return ProcessId.of(self.pid) == self


@dataclass(kw_only=True)
class Record:
    """What is known of a cluster that was started. Written before each thing that must be undone."""

    boot: str
    folder: str  # the state folder
    holder: ProcessId | None = None
    # The process whose end makes the cluster stale; None for one that is kept until `down`.
    owner: ProcessId | None = None
    # Number and specification of each node, so that another process can attach.
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    ready: bool = False

    @property
    def stale(self) -> bool:
        """Whether nobody needs it any more: its owner is gone, it never became ready, or the machine started anew."""
        if self.boot != boot_id() or self.holder is None or not self.holder.alive:
            return True
        return not self.owner.alive if self.owner else not self.ready


def boot_id() -> str:
    """Return what tells this run of the machine from the one before."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def state_folder() -> Path:
    """Return the state folder of a cluster that is started now."""
    return cache_root() / "cluster"


def lock_file() -> Path:
    """Return the lock that whoever starts or ends the machine's cluster holds."""
    return HOME / "lock"


def write(record: Record, home: Path = HOME) -> None:
    """Write it, whole or not at all."""
    home.mkdir(parents=True, exist_ok=True)
    partial = home / f".record.{os.getpid()}"
    partial.write_text(json.dumps(asdict(record), indent=1))
    partial.replace(home / "record.json")


def read(home: Path = HOME) -> Record | None:
    """Return what is written down; None where no cluster was started since the last clean-up."""
    try:
        found: Mapping[str, Any] = json.loads((home / "record.json").read_text())
    except FileNotFoundError:
        return None
    known = {**found, "holder": _process(found["holder"]), "owner": _process(found["owner"])}
    return Record(**known)


def forget(home: Path = HOME) -> None:
    """Remove the record: nothing is left to undo."""
    (home / "record.json").unlink(missing_ok=True)


def _process(found: Mapping[str, int] | None) -> ProcessId | None:
    return ProcessId(**found) if found else None
