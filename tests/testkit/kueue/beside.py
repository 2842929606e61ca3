"""Kueue beside an API server that has no nodes: its own manager as a process of this machine. No root needed.

Whoever plays the kubelet says how pods run and end; queues, quota, eviction and the webhooks are the real ones.
"""

from __future__ import annotations

import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from testkit import tools
from testkit.kube import Kube
from testkit.kueue.installation import await_webhooks, text
from testkit.kueue.manifests import CERTIFICATE_FILES, Certificate, Manifests
from testkit.pki import Authority
from testkit.process import ServerProcess, free_ports
from testkit.waiting import wait_until

_METRICS_CERTIFICATES = b"/etc/kueue/metrics/certs"
"""Fixed in Kueue's code: the copy that is started here has a folder of its own there, whose path is as long."""


class KueueManager:
    """Kueue for one API server, for as long as the `with` block. Pods in `exempt` namespaces stay out of its hands."""

    def __init__(self, kube: Kube, *, exempt: Sequence[str] = ()) -> None:
        self._kube = kube
        self._exempt = exempt
        self._folder: Path | None = None
        self._process: ServerProcess | None = None

    def __enter__(self) -> Self:
        # Eight characters at random make the path of the certificates as long as the one that it replaces.
        self._folder = folder = Path(tempfile.mkdtemp(prefix="kueue-", dir="/tmp"))
        try:
            self._start(folder)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it. Its objects and webhooks stay, so no pod can be made any more. Harmless when it is not running."""
        if self._process is not None:
            self._process.stop(grace_seconds=0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._folder = None

    def _start(self, folder: Path) -> None:
        port, health = free_ports(2)
        certificate = _certificate(folder)
        url = f"https://127.0.0.1:{port}"
        manifests = Manifests(tools.source("kueue"), certificate=certificate, exempt=self._exempt, url=url)
        crds = manifests.crds()
        self._kube.kubectl("apply", "--server-side", "-f", "-", input=text(crds))
        self._kube.wait_established(*(crd["metadata"]["name"] for crd in crds))
        configuration = manifests.configuration() | {
            "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"host": "127.0.0.1", "port": port, "certDir": str(folder / "cert")},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
        command: list[str | Path] = [_program(folder), f"--config={folder / 'config.yaml'}", "--zap-log-level=2"]
        environment = {"KUBECONFIG": str(self._kube.kubeconfig)}
        self._process = process = ServerProcess(command, log=folder / "kueue.log", env=environment)

        def ready() -> bool:
            process.check()
            return _answers(f"http://127.0.0.1:{health}/readyz")

        wait_until(ready, describe="Kueue's start", timeout=120, detail=process.tail)
        self._kube.apply(*manifests.webhooks())
        await_webhooks(self._kube, log=process.tail)


def _program(folder: Path) -> Path:
    """Return a copy of the manager that looks for the metrics' certificates in the folder."""
    own = str(folder / "cert").encode()
    if len(own) != len(_METRICS_CERTIFICATES):
        raise RuntimeError(f"{own!r} cannot stand for {_METRICS_CERTIFICATES!r}: it is not as long")
    content = tools.binary("kueue").read_bytes()
    if _METRICS_CERTIFICATES not in content:
        raise RuntimeError(f"{_METRICS_CERTIFICATES!r} is not in the program: this is another version of Kueue")
    program = folder / "kueue"
    program.write_bytes(content.replace(_METRICS_CERTIFICATES, own))
    program.chmod(0o700)
    return program


def _certificate(folder: Path) -> Certificate:
    pair = Authority(folder / "pki").issue("webhooks", subject="/CN=kueue", names=["IP:127.0.0.1"])
    found = Certificate(
        authority=(folder / "pki" / "ca.crt").read_bytes(),
        certificate=pair.certificate.read_bytes(),
        key=pair.key.read_bytes(),
    )
    (folder / "cert").mkdir()
    for name, content in zip(CERTIFICATE_FILES, (found.authority, found.certificate, found.key), strict=True):
        (folder / "cert" / name).write_bytes(content)
    return found


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
