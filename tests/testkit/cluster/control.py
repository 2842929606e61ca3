"""The control plane of the cluster, and what every node shares: service addresses and names."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

from testkit.cluster import configs
from testkit.cluster.record import ProcessId
from testkit.cluster.sandbox import Sandbox
from testkit.cluster.spec import API_PORT, CONTROL_ADDRESS
from testkit.controlplane import ADMIN, apiserver_command, etcd_command, wait_ready
from testkit.kube import Kube
from testkit.pki import Authority, write_kubeconfig
from testkit.process import flags

SERVER = f"https://{CONTROL_ADDRESS}:{API_PORT}"
_ETCD_PORTS = (2379, 2380)
_PODS = "10.244.0.0/17"


class ControlPlaneError(RuntimeError):
    """A program of the control plane ended. The message holds the end of its log."""


class Control:
    """etcd, API server, controller manager, scheduler; kube-proxy and CoreDNS."""

    def __init__(self, sandbox: Sandbox, *, programs: Mapping[str, Path]) -> None:
        self.folder = sandbox.folder
        self.authority = Authority(sandbox.folder / "pki")
        self._sandbox = sandbox
        self._programs = programs
        self._processes: dict[str, ProcessId] = {}

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.folder / "admin.conf"

    def start_server(self) -> None:
        """Start etcd and the API server."""
        admin = self.authority.issue("admin", subject=ADMIN)
        client, peer = _ETCD_PORTS
        data = self.folder / "etcd"
        self._spawn(etcd_command(self._programs["etcd"], data=data, client_port=client, peer_port=peer))
        self._spawn(
            apiserver_command(
                self._programs["kube-apiserver"],
                authority=self.authority,
                etcd_port=client,
                address=CONTROL_ADDRESS,
                port=API_PORT,
                extra={
                    "allow-privileged": True,
                    "enable-admission-plugins": "NodeRestriction",
                    "kubelet-client-certificate": admin.certificate,
                    "kubelet-client-key": admin.key,
                    "kubelet-certificate-authority": self.authority.root.certificate,
                    # By default logs and exec look the node's name up, which no name server here knows.
                    "kubelet-preferred-address-types": "InternalIP",
                },
            )
        )
        self._kubeconfig("admin", subject=ADMIN)

    def await_server(self) -> None:
        """Wait until the API server answers."""
        context = ssl.create_default_context(cafile=str(self.authority.root.certificate))
        context.load_cert_chain(self.authority.folder / "admin.crt", self.authority.folder / "admin.key")
        wait_ready(CONTROL_ADDRESS, port=API_PORT, context=context, check=self.check)

    def start_controllers(self) -> None:
        """Start the controller manager and the scheduler. A lost node is noticed within seconds."""
        manager = self._kubeconfig("kube-controller-manager", subject="/CN=system:kube-controller-manager")
        own = {"kubeconfig": manager, "authentication-kubeconfig": manager, "authorization-kubeconfig": manager}
        options = {
            "use-service-account-credentials": True,
            "service-account-private-key-file": self.authority.signing_key("service-accounts"),
            "root-ca-file": self.authority.root.certificate,
            "cluster-cidr": _PODS,
            "allocate-node-cidrs": False,
            "leader-elect": False,
            "node-monitor-period": "1s",
            "node-monitor-grace-period": f"{configs.GRACE_SECONDS}s",
            # By default one lost node in ten seconds is acted upon, which a small cluster has no use for.
            "node-eviction-rate": 10,
            "secondary-node-eviction-rate": 10,
        }
        self._spawn([str(self._programs["kube-controller-manager"]), *flags({**own, **options})])
        scheduler = self._kubeconfig("kube-scheduler", subject="/CN=system:kube-scheduler")
        own = {"kubeconfig": scheduler, "authentication-kubeconfig": scheduler, "authorization-kubeconfig": scheduler}
        self._spawn([str(self._programs["kube-scheduler"]), *flags({**own, "leader-elect": False})])

    def start_network(self, kube: Kube, *, node: str) -> None:
        """Start kube-proxy, once for all nodes since they share one network namespace, and the DNS server."""
        proxy = self._kubeconfig("kube-proxy", subject="/CN=system:kube-proxy")
        options = {
            "kubeconfig": proxy,
            "hostname-override": node,
            "cluster-cidr": _PODS,
            "proxy-mode": "iptables",
            # These settings belong to the whole machine.
            "conntrack-max-per-core": 0,
            "conntrack-tcp-timeout-established": "0s",
            "conntrack-tcp-timeout-close-wait": "0s",
        }
        self._spawn([str(self._programs["kube-proxy"]), *flags(options)])
        kube.apply(*_dns_rights())
        names = self._kubeconfig("coredns", subject="/CN=system:coredns")
        corefile = self.folder / "Corefile"
        corefile.write_text(configs.corefile(names))
        self._spawn([str(self._programs["coredns"]), "-conf", str(corefile)])

    def check(self) -> None:
        """Raise `ControlPlaneError` when one of its programs has ended."""
        for name, process in self._processes.items():
            if not process.alive:
                log = self._sandbox.logs / f"{name}.log"
                end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise ControlPlaneError(f"{name} ended; the end of {log}:\n{end}")

    def _spawn(self, command: list[str]) -> None:
        name = Path(command[0]).name
        self._processes[name] = self._sandbox.spawn(name, command, group="control")

    def _kubeconfig(self, name: str, *, subject: str) -> Path:
        pair = self.authority.issue(name, subject=subject)
        path = self.folder / f"{name}.conf"
        return write_kubeconfig(path, server=SERVER, authority=self.authority.root.certificate, pair=pair)


def _dns_rights() -> list[dict[str, object]]:
    group = "rbac.authorization.k8s.io"
    rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    subject = {"apiGroup": group, "kind": "User", "name": "system:coredns"}
    proxy = {"apiGroup": group, "kind": "User", "name": "system:kube-proxy"}
    return [
        {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": {"name": "testkit:dns"}, "rules": rules},
        _binding("testkit:dns", role="testkit:dns", subject=subject),
        _binding("testkit:proxy", role="system:node-proxier", subject=proxy),
    ]


def _binding(name: str, *, role: str, subject: dict[str, str]) -> dict[str, object]:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [subject],
    }
