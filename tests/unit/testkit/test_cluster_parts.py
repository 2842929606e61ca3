"""The pure parts of the local cluster."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from testkit.cluster import configs, images, preflight, record
from testkit.cluster.cgroups import Hierarchies
from testkit.cluster.record import ProcessId, Record
from testkit.cluster.spec import Addressing, NodeSpec, Taint, default_nodes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nvidia.com/gpu=present:NoSchedule", ("nvidia.com/gpu", "present", "NoSchedule")),
        ("spot:NoExecute", ("spot", "", "NoExecute")),
        ("key=:PreferNoSchedule", ("key", "", "PreferNoSchedule")),
    ],
)
def test_taints_are_read_in_kubectls_notation(text, expected):
    taint = Taint.parse(text)
    assert (taint.key, taint.value, taint.effect) == expected


@pytest.mark.parametrize("text", ["nvidia.com/gpu", "key=value:Never", "=value:NoSchedule", ""])
def test_a_malformed_taint_is_refused_when_the_node_is_described(text):
    with pytest.raises(ValueError, match="is not like key=value:NoSchedule"):
        NodeSpec("node", taints=[text])


@pytest.mark.parametrize("name", ["", "Node", "-node", "node-", "a_b", "x" * 43])
def test_a_node_name_is_a_dns_label(name):
    with pytest.raises(ValueError, match="node name"):
        NodeSpec(name)


def test_nodes_have_addresses_of_their_own():
    seen = [(a.node, a.pods, a.bridge) for a in (Addressing(index=i) for i in range(1, 101))]
    assert len({node for node, _, _ in seen}) == len({pods for _, pods, _ in seen}) == 100
    assert ("10.244.255.11", "10.244.1.0/24", "node1") in seen
    # A network device's name has at most 15 characters.
    assert all(len(bridge) <= 15 for _, _, bridge in seen)
    with pytest.raises(ValueError, match="room for 100 nodes"):
        Addressing(index=101)


def test_the_default_nodes_are_those_of_the_design():
    nodes = {node.name: node for node in default_nodes()}
    assert [node.gpus for node in nodes.values()] == [0, 2, 2, 2]
    assert nodes["a100-1"].labels["nvidia.com/gpu.product"] == "NVIDIA-A100-SXM4-80GB"
    assert list(nodes["a100-2"].taints) == ["nvidia.com/gpu=present:NoSchedule"]
    assert nodes["rtx-1"].labels["nvidia.com/gpu.product"] == "NVIDIA-GeForce-RTX-4090"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trainer:1", "docker.io/library/trainer:1"),
        ("trainer", "docker.io/library/trainer:latest"),
        ("team/trainer:1", "docker.io/team/trainer:1"),
        ("registry.example/team/trainer:1", "registry.example/team/trainer:1"),
        ("localhost/trainer", "localhost/trainer:latest"),
        ("localhost:5000/trainer:2", "localhost:5000/trainer:2"),
    ],
)
def test_image_names_are_completed_as_the_kubelet_does(name, expected):
    assert images.normalised(name) == expected


def test_an_image_is_folders_and_a_configuration():
    image = images.Image("t:1", entrypoint=["python", "-m", "x"], env={"B": "2", "A": "1"}, workdir="/data")
    content = images.archive(image)
    assert content == images.archive(image)
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        manifest = json.load(outer.extractfile("manifest.json"))
        config = json.load(outer.extractfile("config.json"))["config"]
        layer = outer.extractfile("layer.tar").read()
    assert manifest[0]["RepoTags"] == ["docker.io/library/t:1"]
    assert config == {
        "Entrypoint": ["python", "-m", "x"],
        "Env": ["A=1", "B=2"],
        "User": "10001:10001",
        "WorkingDir": "/data",
    }
    with tarfile.open(fileobj=io.BytesIO(layer)) as inner:
        entries = {entry.name: entry for entry in inner}
    assert entries["tmp"].mode == 0o1777
    assert entries["data"].isdir()
    assert {name for name, entry in entries.items() if entry.isfile()} == {
        "etc/passwd",
        "etc/group",
        "etc/nsswitch.conf",
    }


def test_binds_do_not_lie_within_each_other(tmp_path):
    binds = images.machine_binds([images.Bind(source=str(tmp_path), target="/usr/share/data")])
    targets = [Path(bind.target) for bind in binds]
    assert Path("/usr") in targets
    assert not any(a != b and a.is_relative_to(b) for a in targets for b in targets)
    assert Path(images.CODE, "crds") in targets


def test_the_base_spec_adds_read_only_binds_and_drops_limits():
    given = {"process": {"rlimits": [1], "cwd": "/"}, "mounts": [{"destination": "/proc"}]}
    made = images.base_spec(given, binds=[images.Bind(source="/a", target="/b")])
    assert made["process"] == {"cwd": "/"}
    assert made["mounts"][0] == {"destination": "/proc"}
    assert (made["mounts"][1]["source"], made["mounts"][1]["destination"]) == ("/a", "/b")
    assert "ro" in made["mounts"][1]["options"]


def test_a_smaller_node_sets_the_rest_aside_and_a_larger_one_is_refused():
    assert configs.reserved(NodeSpec("n"), cores=4, memory_gib=16) == {}
    assert configs.reserved(NodeSpec("n", cpu=1, memory_gib=4), cores=4, memory_gib=16) == {
        "cpu": "3",
        "memory": "12288Mi",
    }
    for large in (NodeSpec("n", cpu=5), NodeSpec("n", memory_gib=17)):
        with pytest.raises(configs.NodeTooLargeError, match="this machine has 4 and 16: ask for less"):
            configs.reserved(large, cores=4, memory_gib=16)


def test_networks_that_the_cluster_would_hide_are_named():
    assert preflight.overlaps(["192.168.0.0/24", "10.0.0.0/16", "fd00::/8"]) == []
    [problem] = preflight.overlaps(["10.244.3.0/24"])
    assert "10.244.0.0/16 collide with this machine's network 10.244.3.0/24" in problem
    # A wide route, as some VPNs set, hides or is hidden as well.
    assert len(preflight.overlaps(["10.0.0.0/8"])) == 2


def test_without_root_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(preflight.MachineUnfitError, match=r"(?s)needs root.*run with sudo.*CLUSTER=current"):
        preflight.require(tmp_path)


def test_without_control_groups_one_sentence_says_what_to_do(tmp_path):
    [problem] = preflight.group_problems(Hierarchies.of_machine(tmp_path / "absent"))
    assert "mount cgroup2 there" in problem
    for name in ("cpu,cpuacct", "memory"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    [problem] = preflight.group_problems(Hierarchies.of_machine(tmp_path))
    assert "controllers cpuset, pids" in problem


def test_groups_are_made_in_every_hierarchy_and_found_again(tmp_path):
    for name in ("cpuset", "memory"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    (tmp_path / "cpuset" / "cpuset.cpus").write_text("0-3\n")
    found = Hierarchies.of_machine(tmp_path)
    assert (found.version, len(found.mounts)) == (1, 2)
    found.create("root/nodes/one")
    (tmp_path / "memory" / "root" / "nodes" / "cgroup.procs").write_text("12\n")
    (tmp_path / "cpuset" / "root" / "nodes" / "one" / "cgroup.procs").write_text("12\n34\n0\n")
    assert found.processes("root") == {12, 34}
    assert found.exists("root/nodes/one")
    assert not found.exists("root/nodes/two")


def test_version_2_is_recognised_and_delegates_what_there_is(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpu memory")
    found = Hierarchies.of_machine(tmp_path)
    assert (found.version, found.mounts) == (2, (tmp_path,))
    found.create("root/part")
    assert (tmp_path / "root" / "part").is_dir()
    assert (tmp_path / "cgroup.subtree_control").exists()


def test_a_record_survives_being_written_down(tmp_path):
    assert record.read(tmp_path) is None
    own = ProcessId.of(os.getpid())
    nodes = {"a": {"index": 1, "spec": {"name": "a"}}}
    written = Record(boot=record.boot_id(), folder="/state", holder=own, owner=own, nodes=nodes, ready=True)
    record.write(written, tmp_path)
    assert record.read(tmp_path) == written
    record.forget(tmp_path)
    assert record.read(tmp_path) is None


def test_a_record_is_stale_when_nobody_needs_the_cluster_any_more():
    own = ProcessId.of(os.getpid())
    gone = ProcessId(pid=own.pid, started=own.started - 1)
    boot = record.boot_id()
    assert not Record(boot=boot, folder="/s", holder=own, owner=own).stale  # being started
    assert not Record(boot=boot, folder="/s", holder=own, ready=True).stale  # kept
    assert Record(boot=boot, folder="/s", holder=own, ready=False).stale  # was to be kept, but its start was cut short
    assert Record(boot=boot, folder="/s", holder=own, owner=gone, ready=True).stale
    assert Record(boot=boot, folder="/s", holder=gone, owner=own, ready=True).stale
    assert Record(boot="another", folder="/s", holder=own, owner=own, ready=True).stale


def test_configurations_are_well_formed(tmp_path):
    import tomllib

    import yaml

    from testkit.pki import KeyPair

    programs = {name: Path("/tools", name, name) for name in ("bridge", "host-local", "loopback", "runc")}
    runtime = tomllib.loads(configs.containerd(tmp_path, programs=programs))
    plugin = runtime["plugins"]["io.containerd.cri.v1.runtime"]
    assert plugin["cni"]["bin_dirs"] == ["/tools/bridge", "/tools/host-local", "/tools/loopback"]
    assert plugin["containerd"]["runtimes"]["runc"]["options"]["BinaryName"] == "/tools/runc/runc"
    pair = KeyPair(certificate=Path("/c"), key=Path("/k"))
    spec = NodeSpec("one", taints=["a=b:NoExecute"])
    text = configs.kubelet(spec, folder=tmp_path, addressing=Addressing(index=1), authority=Path("/ca"), serving=pair)
    kubelet = yaml.safe_load(text)
    assert kubelet["registerWithTaints"] == [{"key": "a", "value": "b", "effect": "NoExecute"}]
    assert kubelet["authentication"]["anonymous"]["enabled"] is False
    # A lost node is noticed only if heartbeats are clearly more frequent than the grace period.
    assert kubelet["nodeLeaseDurationSeconds"] / 4 * 3 < configs.GRACE_SECONDS
    network = json.loads(configs.cni(tmp_path, addressing=Addressing(index=7)))
    assert network["plugins"][0]["ipam"]["ranges"] == [[{"subnet": "10.244.7.0/24"}]]


def test_a_state_folder_too_long_for_sockets_is_refused():
    assert preflight.path_problems(Path("/home/someone/.cache/diffusion-operator/cluster")) == []
    [problem] = preflight.path_problems(Path("/home", "x" * 80))
    assert "is 25 characters too long for sockets: shorten DIFFUSION_OPERATOR_CACHE" in problem


def test_an_environment_that_pods_cannot_see_is_refused():
    assert preflight.environment_problems(Path("/home/someone/.cache/diffusion-operator/python-0123")) == []
    [problem] = preflight.environment_problems(Path("/tmp/cache/python-0123"))
    assert "outside /tmp" in problem
