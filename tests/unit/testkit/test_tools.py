"""What the tools' builder decides: what is built, under which name, by which Go."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from testkit import tools
from testkit.tools import catalog, distribution, gobuild, toolchain

FAKE_GO = """#!/bin/sh
[ "$1" = version ] && { echo go version go1.99.0 linux/amd64; exit; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
echo built >> "$FAKE_GO_LOG"
[ -n "$FAKE_GO_FAILS" ] && { echo "go: downloading x" >&2; echo "no such package" >&2; exit 1; }
printf half > "$out"; sleep 0.2; printf whole > "$out"; chmod +x "$out"
"""


@pytest.fixture
def fake_go(tmp_path, monkeypatch) -> Path:
    """A Go that only says that it was called, and a cache of the test's own. Return the log of calls."""
    program = tmp_path / "bin" / "go"
    program.parent.mkdir()
    program.write_text(FAKE_GO)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DIFFUSION_OPERATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_GO_LOG", str(tmp_path / "log"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return tmp_path / "log"


def test_only_what_is_asked_for_is_built_and_only_once(fake_go, capsys):
    found = tools.binary("ctr")
    assert found.read_text() == "whole"
    assert capsys.readouterr().err.startswith("building ctr from source")
    assert tools.binary("ctr") == found
    assert fake_go.read_text() == "built\n"
    assert [path.name for path in found.parents[1].iterdir() if not path.name.endswith(".lock")] == [found.parent.name]
    assert found.parent.name.startswith("ctr-v2.4.2-")


def test_two_processes_build_once(fake_go):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=tools.ensure, args=(["ctr", "containerd"],)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert fake_go.read_text() == "built\n" * 2


@pytest.mark.usefixtures("fake_go")
def test_a_failed_build_leaves_nothing_and_says_why(monkeypatch):
    monkeypatch.setenv("FAKE_GO_FAILS", "1")
    with pytest.raises(tools.ToolError, match=r"(?s)coredns v1\.15\.0 did not build.*no such package") as caught:
        tools.binary("coredns")
    assert "downloading" not in str(caught.value)
    monkeypatch.delenv("FAKE_GO_FAILS")
    assert tools.binary("coredns").read_text() == "whole"


def test_the_source_of_a_tool_is_found_at_its_pinned_version(fake_go, tmp_path):
    program = tmp_path / "bin" / "go"
    program.write_text(
        '#!/bin/sh\n[ "$1" = version ] && { echo go version go1.99.0 linux/amd64; exit; }\n'
        'echo "$PWD $*" > "$FAKE_GO_LOG"\n[ -n "$FAKE_GO_FAILS" ] && { echo no network >&2; exit 1; }\n'
        """echo '{"Dir": "/modules/kueue@v0.17.0"}'\n"""
    )
    assert tools.source("kueue") == Path("/modules/kueue@v0.17.0")
    folder = catalog.TOOLS["kueue"].module.path
    assert fake_go.read_text() == f"{folder} mod download -json sigs.k8s.io/kueue\n"


@pytest.mark.usefixtures("fake_go")
def test_a_source_that_cannot_be_had_says_why(monkeypatch):
    monkeypatch.setenv("FAKE_GO_FAILS", "1")
    with pytest.raises(tools.ToolError, match=r"(?s)source of kwok v0\.8\.0 could not be had.*no such package"):
        tools.source("kwok")


@pytest.mark.usefixtures("fake_go")
def test_an_interrupted_build_is_begun_anew():
    partial = gobuild._home() / ".coredns.partial"
    partial.mkdir(parents=True)
    (partial / "coredns").write_text("half")
    assert tools.binary("coredns").read_text() == "whole"


@pytest.mark.usefixtures("fake_go")
def test_kubebuilder_assets_serve(tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in ("etcd", "kubelet"):
        (assets / name).touch(mode=0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    found = tools.ensure(["etcd", "kubelet"])
    assert found["etcd"] == assets / "etcd"
    assert found["kubelet"] != assets / "kubelet"  # envtest has none; a stray file is not trusted


def test_an_unknown_tool_is_refused_by_name():
    with pytest.raises(tools.ToolError, match="no such tool: docker; there are bridge, containerd"):
        tools.ensure(["kubectl", "docker"])


def test_every_tool_is_pinned():
    for tool in catalog.TOOLS.values():
        assert tool.version.startswith("v")
        if tool.module.source:
            assert (tool.module.path / "go.sum").stat().st_size > 0
            assert f'_ "{tool.package}"' in (tool.module.path / "tools.go").read_text()
    assert catalog.TOOLS["kube-apiserver"].version == "v1.36.3"
    assert catalog.TOOLS["bridge"].version == "v1.9.1"  # that of the plugins, not of containerd beside them


def test_the_key_changes_with_the_pins(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "MODULES", tmp_path)
    (tmp_path / "thing").mkdir()
    pins = tmp_path / "thing" / "go.mod"
    pins.write_text("module x\n\ngo 1.26.0\n\nrequire example.org/thing v1.2.3\n")
    module = catalog.Module(folder="thing", source="example.org/thing")
    tool = catalog.Tool(name="thing", module=module, package="example.org/thing")
    first = tool.key
    assert first.startswith("thing-v1.2.3-")
    assert module.go_version() == (1, 26, 0)
    pins.write_text(pins.read_text() + "\nreplace a => b v1.0.0\n")
    assert tool.key != first
    with pytest.raises(LookupError, match=r"does not require example\.org/other"):
        module.version("example.org/other")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("go version go1.26.8 linux/amd64", (1, 26, 8)),
        ("go version go1.27 darwin/arm64", (1, 27)),
        ("go version go1.26rc2 linux/amd64", (1, 26, -1)),
        ("go: not found", ()),
    ],
)
def test_the_version_of_go_is_read(text, expected):
    assert toolchain.parse_version(text) == expected


def test_a_candidate_is_too_old_for_its_release():
    assert (
        toolchain.parse_version("go version go1.26rc2 x")
        < (1, 26, 0)
        <= toolchain.parse_version("go version go1.26.0 x")
    )


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda *_args, **_kwargs: None)
    with pytest.raises(
        distribution.MissingPackagesError, match="the cluster needs iptables, conntrack: run `sudo apt-get"
    ):
        distribution.require(["iptables", "conntrack"], purpose="the cluster")
