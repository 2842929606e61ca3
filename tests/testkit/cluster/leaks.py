"""What a cluster may leave behind outside its walls, and whether it did."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from testkit.cluster import cgroups, record, spec
from testkit.cluster.sandbox import KERNEL_SETTINGS, MARK
from testkit.waiting import wait_until

Snapshot = Mapping[str, frozenset[str]]


def snapshot(*, folder: Path | None = None) -> Snapshot:
    """Return what of the machine a cluster could change, by kind. Others' networks and mounts are none of it."""
    state = folder or record.state_folder()
    known = record.HOME / "record.json"
    return {
        "process": frozenset(_processes()),
        "control group": frozenset(_groups()),
        "mount": frozenset(_mounts(state)),
        "network link": frozenset({spec.HOST_LINK} if Path("/sys/class/net", spec.HOST_LINK).exists() else ()),
        "firewall rule": frozenset(_rules()),
        "kernel setting": frozenset(_settings()),
        "record": frozenset({str(known)} if known.exists() else ()),
    }


def left_behind(before: Snapshot, *, timeout: float = 5) -> list[str]:
    """Return what is there now and was not in `before`, one line each. The kernel gets a moment to finish."""
    found: list[str] = []

    def clean() -> bool:
        now = snapshot()
        found[:] = [f"{kind}: {name}" for kind, names in now.items() for name in sorted(names - before[kind])]
        return not found

    with contextlib.suppress(TimeoutError):
        wait_until(clean, describe="the cluster's remains to vanish", timeout=timeout)
    return found


def _processes() -> Iterator[str]:
    inside = cgroups.Hierarchies.of_machine().processes(cgroups.ROOT)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it may end while we look; one that only waits to be reaped has no environ
            # Whatever left its group is still known by the mark that all of the cluster's processes inherit.
            marked = f"{MARK}=".encode() in (entry / "environ").read_bytes()
            if marked or int(entry.name) in inside:
                yield f"{entry.name} {(entry / 'comm').read_text().strip()}"


def _groups() -> Iterator[str]:
    for folder in cgroups.Hierarchies.of_machine().folders(cgroups.ROOT):
        if folder.exists():
            yield str(folder)


def _mounts(state: Path) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if str(state) in line:
            yield line.split()[4]


def _rules() -> Iterator[str]:
    for program in ("iptables-save", "ip6tables-save"):
        found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
        if found is None:
            continue
        text = subprocess.run([found], capture_output=True, text=True, check=False).stdout
        yield from (line for line in text.splitlines() if re.search(r"\b(KUBE|CNI)-", line))


def _settings() -> Iterator[str]:
    for name in (*KERNEL_SETTINGS, "net/ipv4/ip_forward"):
        with contextlib.suppress(OSError):
            yield f"{name}={Path('/proc/sys', name).read_text().strip()}"
