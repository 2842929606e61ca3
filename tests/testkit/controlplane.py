"""A real API server with its etcd, and nothing else: for tests of what talks to Kubernetes. No root needed.

There are no controllers, no scheduler and no nodes: objects are validated, defaulted, admitted (Pod Security too) and
authorised by RBAC, but nobody creates, schedules, runs or collects them. A test writes the status it needs.
"""

from __future__ import annotations

import http.client
import shutil
import ssl
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from testkit import tools
from testkit.kube import Kube
from testkit.pki import Authority, write_kubeconfig
from testkit.process import ServerProcess, flags, free_ports
from testkit.waiting import wait_until

ADMIN = "/O=system:masters/CN=admin"
SERVICE_RANGE = "10.96.0.0/16"
SERVICE_ADDRESS = "10.96.0.1"  # of the service `kubernetes`: the first of the range


def etcd_command(program: Path, *, data: Path, client_port: int, peer_port: int) -> list[str]:
    """Return how etcd is started for a cluster that nobody will miss."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    options = {
        "data-dir": data,
        "log-level": "warn",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
        # What is on the disk is not needed after a crash of the machine.
        "unsafe-no-fsync": True,
    }
    return [str(program), *flags(options)]


def apiserver_command(
    program: Path, *, authority: Authority, etcd_port: int, address: str, port: int, extra: Mapping[str, object]
) -> list[str]:
    """Return how the API server is started: TLS, Node and RBAC authorisation, tokens of service accounts."""
    names = {f"IP:{address}", "IP:127.0.0.1", f"IP:{SERVICE_ADDRESS}", "DNS:kubernetes.default.svc", "DNS:kubernetes"}
    serving = authority.issue("apiserver", subject="/CN=kube-apiserver", names=sorted(names))
    signing = authority.signing_key("service-accounts")
    options = {
        "etcd-servers": f"http://127.0.0.1:{etcd_port}",
        "bind-address": address,
        "advertise-address": address,
        "secure-port": port,
        "tls-cert-file": serving.certificate,
        "tls-private-key-file": serving.key,
        "client-ca-file": authority.root.certificate,
        "service-cluster-ip-range": SERVICE_RANGE,
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-key-file": signing,
        "service-account-signing-key-file": signing,
        "authorization-mode": "Node,RBAC",
        "profiling": False,
    }
    return [str(program), *flags({**options, **extra})]


class ControlPlane:
    """An API server on a port of its own, for as long as the `with` block. Several can run side by side."""

    def __init__(self, *, options: Mapping[str, object] | None = None) -> None:
        """`options` are further flags of kube-apiserver, without the dashes."""
        self._extra = dict(options or {})
        self._folder: Path | None = None
        self._processes: list[ServerProcess] = []
        self._authority: Authority | None = None
        self._kube: Kube | None = None
        self.url = ""

    def start(self) -> Self:
        """Start it and wait until it answers; a few seconds."""
        programs = tools.ensure(tools.CONTROL_PLANE)
        self._folder = folder = Path(tempfile.mkdtemp(prefix="testkit-controlplane-"))
        try:
            self._start(programs, folder)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it and forget its data. Harmless when it is not running."""
        if self._kube is not None:
            self._kube.close()
        for process in reversed(self._processes):
            process.stop(grace_seconds=0)
        self._processes.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._kube = self._authority = None

    def pause(self) -> None:
        """Stop answering, as in an outage: requests hang and time out. `resume` ends it."""
        self._apiserver.pause()

    def resume(self) -> None:
        """Answer again after `pause`."""
        self._apiserver.resume()

    @property
    def kube(self) -> Kube:
        """Access with the rights of an administrator."""
        if self._kube is None:
            raise RuntimeError("the control plane is not running: use it in a `with` block or call start()")
        return self._kube

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.kube.kubeconfig

    @property
    def authority(self) -> Path:
        """The certificate that the server's is signed by."""
        return self._signer.root.certificate

    def user_kubeconfig(self, user: str, *, groups: Sequence[str] = ()) -> Path:
        """Return a kubeconfig of a user, who may do what RBAC has been told and no more."""
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        name = f"user-{user.replace(':', '-')}"
        pair = self._signer.issue(name, subject=subject)
        return write_kubeconfig(self._home / f"{name}.conf", server=self.url, authority=self.authority, pair=pair)

    def service_account_kubeconfig(self, name: str, *, namespace: str) -> Path:
        """Return a kubeconfig with a real token of the service account, which is made where it is missing."""
        if self.kube.find("serviceaccounts", name, namespace=namespace) is None:
            self.kube.api.create("serviceaccounts", {"metadata": {"name": name}}, namespace=namespace)
        token = self.kube.kubectl("create", "token", name, "--namespace", namespace).strip()
        path = self._home / f"account-{namespace}-{name}.conf"
        return write_kubeconfig(path, server=self.url, authority=self.authority, token=token)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, programs: dict[str, Path], folder: Path) -> None:
        etcd_port, peer_port, port = free_ports(3)
        self._authority = authority = Authority(folder / "pki")
        etcd = etcd_command(programs["etcd"], data=folder / "etcd", client_port=etcd_port, peer_port=peer_port)
        self._processes.append(ServerProcess(etcd, log=folder / "etcd.log"))
        command = apiserver_command(
            programs["kube-apiserver"],
            authority=authority,
            etcd_port=etcd_port,
            address="127.0.0.1",
            port=port,
            # Without a controller manager no namespace gets its default service account, so pods must do without.
            extra={
                "disable-admission-plugins": "ServiceAccount",
                "endpoint-reconciler-type": "none",
                **self._extra,
            },
        )
        self._processes.append(ServerProcess(command, log=folder / "kube-apiserver.log"))
        self.url = f"https://127.0.0.1:{port}"
        admin = authority.issue("admin", subject=ADMIN)
        kubeconfig = write_kubeconfig(
            folder / "admin.conf", server=self.url, authority=authority.root.certificate, pair=admin
        )
        self._kube = Kube(kubectl=programs["kubectl"], kubeconfig=kubeconfig, cache=folder / "kubectl")
        context = ssl.create_default_context(cafile=str(authority.root.certificate))
        context.load_cert_chain(admin.certificate, admin.key)
        wait_ready("127.0.0.1", port=port, context=context, check=self._check)

    def _check(self) -> None:
        for process in self._processes:
            process.check()

    @property
    def _home(self) -> Path:
        if self._folder is None:
            raise RuntimeError("the control plane is not running: use it in a `with` block or call start()")
        return self._folder

    @property
    def _signer(self) -> Authority:
        if self._authority is None:
            raise RuntimeError("the control plane is not running: use it in a `with` block or call start()")
        return self._authority

    @property
    def _apiserver(self) -> ServerProcess:
        return next(process for process in self._processes if process.name == "kube-apiserver")


def wait_ready(
    address: str, *, port: int, context: ssl.SSLContext, check: Callable[[], None], timeout: float = 90
) -> None:
    """Wait until the API server is ready and has made the namespace `default`; `check` raises when it has ended."""

    def ready() -> bool:
        check()
        return all(_answers(address, port, context, path) for path in ("/readyz", "/api/v1/namespaces/default"))

    wait_until(ready, describe=f"the API server at {address}:{port}", timeout=timeout)


def _answers(address: str, port: int, context: ssl.SSLContext, path: str) -> bool:
    connection = http.client.HTTPSConnection(address, port, context=context, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()
