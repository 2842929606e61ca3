"""The walls around the cluster: a network and a mount namespace of its own, and its control groups.

Bridges, addresses, firewall rules and mounts come into being inside the namespaces and vanish with the last process in
them. Outside there is one network link, the control groups and the state folder. `Sandbox` is usable from any process
that knows the holder, so that a later one can end what an earlier one started.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from testkit.cluster import cgroups, spec
from testkit.cluster.record import ProcessId
from testkit.waiting import wait_until

# Written by programs of the cluster, and none of the machine's business.
_PRIVATE = ("/run", "/var/log", "/var/lib", "/etc/cni")
# The kubelet wants these values and would set them for the whole machine; it is shown that they are set.
KERNEL_SETTINGS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
# The variable that every process of the cluster has in its environment.
MARK = "DIFFUSION_OPERATOR_TESTKIT_GROUPS"
# In its group before it is anything else, so that no moment exists in which it could be lost; and in the background of
# a shell that ends, so that it is nobody's child and outlives whoever started it.
_LAUNCH = f"""
for g in ${MARK}; do echo $$ > "$g/cgroup.procs" || exit 97; done
"$@" >> "$LOG" 2>&1 < /dev/null &
echo $!
"""
# `pause` at the end holds the namespaces open until it is killed.
_HOLD = """
set -e
mount --make-rshared /
for folder in $PRIVATE; do [ -d $folder ] && mount -t tmpfs -o mode=755 none $folder; done
for setting in $SETTINGS; do
  [ -e /proc/sys/$setting ] && mount --bind "$STATE/settings/$(echo $setting | tr / -)" /proc/sys/$setting
done
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1
: > "$STATE/held"
exec "$PAUSE"
"""


class SandboxError(RuntimeError):
    """The walls could not be put up, or a command within them failed."""


class Sandbox:
    """The namespaces and groups of one cluster, with its state in `folder`."""

    def __init__(self, folder: Path, *, holder: ProcessId | None = None) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.holder = holder
        self.hierarchies = cgroups.Hierarchies.of_machine()

    def create(self, *, pause: Path, needed: Sequence[Path] = ()) -> ProcessId:
        """Make groups and namespaces, held open by a process that is returned, and the link into them.

        `needed` are paths of this machine that must be seen inside.
        """
        settings = self.folder / "settings"
        settings.mkdir(parents=True, exist_ok=True)
        for name, value in KERNEL_SETTINGS.items():
            (settings / name.replace("/", "-")).write_text(f"{value}\n")
        (self.folder / "held").unlink(missing_ok=True)
        visible = (self.folder, pause, *needed)
        private = [path for path in _PRIVATE if not any(seen.is_relative_to(path) for seen in visible)]
        environment = {
            "STATE": str(self.folder),
            "PAUSE": str(pause),
            "PRIVATE": " ".join(private),
            "SETTINGS": " ".join(KERNEL_SETTINGS),
        }
        command = ["unshare", "--net", "--mount", "--", "/bin/sh", "-c", _HOLD]
        self.holder = holder = self._start("holder", command, group="", environment=environment)

        def held() -> bool:
            if not holder.alive:
                raise SandboxError(f"no namespaces for the cluster: {(self.logs / 'holder.log').read_text().strip()}")
            return (self.folder / "held").exists()

        wait_until(held, describe="the cluster's namespaces")
        self._link(holder.pid)
        return holder

    def spawn(
        self, name: str, command: Sequence[str], *, group: str, environment: Mapping[str, str] | None = None
    ) -> ProcessId:
        """Start a program inside, in the group of this name, with its output appended to logs/NAME.log."""
        return self._start(name, [*self._enter(), *command], group=group, environment=environment)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside, wait for it and return its output."""
        return _run([*self._enter(), *command], check=check)

    def kill(self, group: str = "") -> None:
        """End every process of a group, or of the whole cluster, at once."""
        self.hierarchies.kill(f"{cgroups.ROOT}/{group}")

    def destroy(self) -> None:
        """End all of it and remove what is outside. Harmless where nothing is left."""
        self.kill()
        if self.hierarchies.exists(cgroups.ROOT):
            self.hierarchies.remove(cgroups.ROOT)
        # The link goes with the namespace, a moment after its last process; by hand it goes now.
        if link_exists():
            _run(["ip", "link", "delete", spec.HOST_LINK], check=False)
        wait_until(lambda: not link_exists(), describe=f"network link {spec.HOST_LINK} to be gone")
        self.holder = None

    def _enter(self) -> list[str]:
        if self.holder is None or not self.holder.alive:
            raise SandboxError("the cluster is not running: start it with `python -m testkit.cluster up`")
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--mount", "--"]

    def _start(
        self, name: str, command: Sequence[str], *, group: str, environment: Mapping[str, str] | None
    ) -> ProcessId:
        path = f"{cgroups.ROOT}/{group or 'control'}"
        self.hierarchies.create(path)
        self.hierarchies.favour(path)
        folders = " ".join(map(str, self.hierarchies.folders(path)))
        self.logs.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["/bin/sh", "-c", _LAUNCH, name, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {}), MARK: folders, "LOG": str(self.logs / f"{name}.log")},
            check=False,
        )
        if done.returncode != 0:
            raise SandboxError(f"{name} could not be started in control group {path}: {done.stderr.strip()}")
        pid = int(done.stdout)
        # One that has ended already is remembered as one that is not alive.
        return ProcessId.of(pid) or ProcessId(pid=pid, started=-1)

    def _link(self, pid: int) -> None:
        peer = ["peer", "name", "uplink", "netns", str(pid)]
        _run(["ip", "link", "add", spec.HOST_LINK, "type", "veth", *peer])
        _run(["ip", "address", "add", f"{spec.HOST_ADDRESS}/30", "dev", spec.HOST_LINK])
        _run(["ip", "link", "set", spec.HOST_LINK, "up"])
        self.run("ip", "address", "add", f"{spec.LINK_ADDRESS}/30", "dev", "uplink")
        self.run("ip", "link", "set", "uplink", "up")
        self.run("ip", "address", "add", f"{spec.CONTROL_ADDRESS}/32", "dev", "lo")
        # A way out is needed for the addresses of services, although they are rewritten before they leave.
        self.run("ip", "route", "add", "default", "via", spec.HOST_ADDRESS)
        for network in spec.RANGES:
            _run(["ip", "route", "add", network, "via", spec.LINK_ADDRESS])


def link_exists() -> bool:
    """Whether the machine's end of the cluster's link is there."""
    return Path("/sys/class/net", spec.HOST_LINK).exists()


def _run(command: Sequence[str], *, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise SandboxError(f"{' '.join(command)} (exit {done.returncode}): {(done.stderr or done.stdout).strip()}")
    return done.stdout
