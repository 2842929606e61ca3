"""The control groups that everything of the cluster runs in.

They are the record of what is ours: a process is born in its group, its children inherit it, and no reuse of process
numbers can put a stranger into it. So the clean-up ends exactly what the cluster started, whoever does the cleaning.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testkit.waiting import wait_until

MOUNT = Path("/sys/fs/cgroup")
# One cluster per machine, so one name.
ROOT = "diffusion-operator-testkit"
_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io", "hugetlb")


@dataclass(frozen=True, kw_only=True)
class Hierarchies:
    """The cgroup file systems of this machine: one with version 2, one per controller with version 1."""

    mounts: tuple[Path, ...]
    version: int

    @classmethod
    def of_machine(cls, mount: Path = MOUNT) -> Hierarchies:
        """Return what is mounted below `mount`; without mounts where there is nothing that serves."""
        if (mount / "cgroup.controllers").exists():
            return cls(mounts=(mount,), version=2)
        with contextlib.suppress(FileNotFoundError):
            named = sorted(path for path in mount.iterdir() if (path / "cgroup.procs").exists())
            # Links are aliases. A version 2 tree beside version 1 is among them: runc makes groups there too.
            mounts = [path for path in named if not path.is_symlink()]
            return cls(mounts=tuple(mounts), version=1)
        return cls(mounts=(), version=0)

    def folders(self, group: str) -> list[Path]:
        """Return where `group` (like `/name/part`) lies in each hierarchy."""
        return [mount / group.strip("/") for mount in self.mounts]

    def create(self, group: str) -> None:
        """Make the group, and those above it, in every hierarchy, ready for processes."""
        for mount in self.mounts:
            folder = mount
            for part in group.strip("/").split("/"):
                if self.version == 2:
                    _delegate(folder)
                parent, folder = folder, folder / part
                folder.mkdir(exist_ok=True)
                # A fresh version 1 cpuset has neither cores nor memory, and takes no process until it has.
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if self.version == 1 and (folder / name).exists() and not (folder / name).read_text().strip():
                        (folder / name).write_text((parent / name).read_text())

    def favour(self, group: str) -> None:
        """Give the group ten times the share of its siblings where they compete for cores.

        Heartbeats must come through while pods use every core, or nodes look lost that are only busy.
        """
        for folder in self.folders(group):
            for name, share in (("cpu.shares", "10240"), ("cpu.weight", "1000")):
                if (folder / name).exists():
                    (folder / name).write_text(share)

    def processes(self, group: str) -> set[int]:
        """Return the processes of the group and of all below it."""
        found: set[int] = set()
        for folder in self.folders(group):
            for below in _bottom_up(folder):
                with contextlib.suppress(OSError):  # it may vanish while we look
                    found.update(map(int, (below / "cgroup.procs").read_text().split()))
        return found - {0}

    def kill(self, group: str, *, timeout: float = 20) -> None:
        """End every process of the group and below, at once, and wait until they are gone."""

        def gone() -> bool:
            alive = {pid for pid in self.processes(group) if not _ended(pid)}
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not alive

        wait_until(gone, describe=f"the processes of control group {group} to end", timeout=timeout, interval=0.02)

    def remove(self, group: str, *, timeout: float = 10) -> None:
        """Remove the group and all below it. Its processes must have ended."""

        def removed() -> bool:
            for folder in self.folders(group):
                for below in _bottom_up(folder):
                    with contextlib.suppress(OSError):  # busy for a moment after its last process
                        below.rmdir()
            return not self.exists(group)

        wait_until(removed, describe=f"control group {group} to be removed", timeout=timeout)

    def exists(self, group: str) -> bool:
        """Whether any hierarchy has the group."""
        return any(folder.exists() for folder in self.folders(group))


def _bottom_up(folder: Path) -> Iterator[Path]:
    for path, _, _ in os.walk(folder, topdown=False):
        yield Path(path)


def _delegate(folder: Path) -> None:
    """Offer the controllers of a version 2 group to those below it; what is not there cannot be offered."""
    for controller in _CONTROLLERS:
        with contextlib.suppress(OSError):
            (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def _ended(pid: int) -> bool:
    """Whether the process has ended, and at most waits for its parent to notice."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        # The first thread may have ended while others still hold on to files and mounts.
        return state in {"Z", "X"} and len(list(Path(f"/proc/{pid}/task").iterdir())) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return True
