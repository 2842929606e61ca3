"""Local clusters end without a trace, also when their starter is killed; and what finds traces can find them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.cluster import LocalCluster, NodeSpec, cgroups, leaks, record, take_down
from testkit.cluster.record import ProcessId
from testkit.cluster.sandbox import MARK
from testkit.cluster.spec import HOST_LINK
from testkit.waiting import wait_until

pytestmark = [pytest.mark.own_cluster, pytest.mark.usefixtures("vacant")]

START = """
from testkit.cluster import LocalCluster, NodeSpec
cluster = LocalCluster([NodeSpec("only")]).start()
print("up", flush=True)
input()
"""


@pytest.fixture(autouse=True)
def nobody_elses() -> None:
    """These tests end clusters: one that is in use must not be among them."""
    found = record.read()
    if found is not None and not found.stale:
        pytest.fail("a local cluster is up: end it first (python -m testkit.cluster status)", pytrace=False)


@pytest.fixture
def vacant() -> None:
    """Somebody else's cluster must not be ended by what these tests do."""
    found = record.read()
    if found is not None and not found.stale:
        pytest.fail("a local cluster is up: end it with `python -m testkit.cluster down`, or wait for who uses it")


@contextlib.contextmanager
def starter() -> Iterator[subprocess.Popen[str]]:
    """Another process that starts a cluster and says so."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", START], env=environment(), **pipes) as process:
        try:
            yield process
        finally:
            process.kill()
            take_down()


def command(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "testkit.cluster", *args]
    return subprocess.run(whole, capture_output=True, text=True, env=environment() | variables, check=False)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_killed_starters_cluster_is_cleaned_up_by_the_next():
    before = leaks.snapshot()
    with starter() as process:
        assert process.stdout.readline() == "up\n"
        process.kill()
        process.wait()
        remains = leaks.left_behind(before, timeout=0)
        assert any("kubelet" in line for line in remains)
        assert any("control group" in line for line in remains)
        # Whatever cache the next one uses: there is one cluster per machine.
        status = command("status", DIFFUSION_OPERATOR_CACHE="/nowhere")
        assert (status.returncode, "killed process" in status.stdout) == (1, True)
        with LocalCluster([NodeSpec("next")]) as cluster:
            assert cluster.nodes == ["next"]
        assert leaks.left_behind(before) == []


def test_a_starter_killed_on_its_way_leaves_nothing_for_long():
    before = leaks.snapshot()
    with starter() as process:
        wait_until(lambda: (record.read() or no_record()).holder, describe="the first process")
        process.kill()
        process.wait()
        assert take_down()
        assert leaks.left_behind(before) == []
        assert not take_down()


def test_up_status_and_down_by_hand():
    before = leaks.snapshot()
    try:
        up = command("up")
        assert up.returncode == 0, up.stderr
        assert "export KUBECONFIG=" in up.stdout
        assert "is up already" in command("up").stdout
        assert command("status").returncode == 0
    finally:
        down = command("down")
    assert down.stdout == "the cluster is down\n"
    assert command("down").stdout == "no cluster was up\n"
    assert command("status").returncode == 1
    assert leaks.left_behind(before) == []


@contextlib.contextmanager
def planted_process() -> Iterator[None]:
    with subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: "x"}) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def planted_group() -> Iterator[None]:
    groups = cgroups.Hierarchies.of_machine()
    groups.create(cgroups.ROOT)
    try:
        yield
    finally:
        groups.remove(cgroups.ROOT)


@contextlib.contextmanager
def planted_mount() -> Iterator[None]:
    folder = record.state_folder() / "planted"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


@contextlib.contextmanager
def planted_link() -> Iterator[None]:
    subprocess.run(["ip", "link", "add", "name", HOST_LINK, "type", "bridge"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "delete", HOST_LINK], check=True)


@contextlib.contextmanager
def planted_rule() -> Iterator[None]:
    subprocess.run(["iptables", "-N", "KUBE-PLANTED"], check=True)
    try:
        yield
    finally:
        subprocess.run(["iptables", "-X", "KUBE-PLANTED"], check=True)


@contextlib.contextmanager
def planted_record() -> Iterator[None]:
    record.write(no_record())
    try:
        yield
    finally:
        record.forget()


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (planted_process, "process: "),
        (planted_group, "control group: "),
        (planted_mount, "mount: "),
        (planted_link, "network link: "),
        (planted_rule, "firewall rule: "),
        (planted_record, "record: "),
    ],
)
def test_what_is_left_behind_is_found(plant, kind):
    before = leaks.snapshot()
    with plant():
        # A process shows its environment a moment after it was started.
        found = wait_until(lambda: leaks.left_behind(before, timeout=0), describe="the remains to be found")
        assert all(line.startswith(kind) for line in found)
    assert leaks.left_behind(before) == []


def test_a_strangers_process_is_not_ours_although_the_number_is():
    """A process number that was used again after ours ended does not make our record look alive."""
    own = ProcessId.of(os.getpid())
    assert own.alive
    assert not ProcessId(pid=own.pid, started=own.started - 1).alive
    assert Path(f"/proc/{own.pid}").exists()


def no_record() -> record.Record:
    return record.Record(boot=record.boot_id(), folder=str(record.state_folder()))
