"""What Kueue's own kustomization makes of its manifests, for one cluster. Pure but for reading the module's source.

Kueue's manifests carry the names of before kustomize: `system` for the namespace, and no prefix. Differences to the
upstream installation, each for the sake of a cluster that lives for minutes:

- the only kind that is handed over to Kueue is the pod, so webhooks of other kinds are left out;
- certificates are given, because a generated one reaches the manager's files only when the kubelet looks again, which
  takes up to a minute;
- one replica without election of a leader, probed every second, that asks for little of the node;
- no visibility API: it needs an aggregation layer, which the local control plane does not have.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from testkit.kube import Object

NAMESPACE = "kueue-system"
MANAGER = "kueue-controller-manager"
WEBHOOK_SERVICE = "kueue-webhook-service"
CERTIFICATE = "kueue-webhook-server-cert"
CONFIGURATION = "kueue-manager-config"
CERTIFICATE_FILES = ("ca.crt", "tls.crt", "tls.key")
# Places that are fixed in Kueue's code.
_CERTIFICATES = ("/tmp/k8s-webhook-server/serving-certs", "/etc/kueue/metrics/certs")
_WEBHOOK_PORT = 9443
_HEALTH_PORT = 8081
_RIGHTS = (
    "service_account",
    "role",
    "role_binding",
    "leader_election_role",
    "leader_election_role_binding",
    "manager_secrets_role",
    "manager_secrets_role_binding",
    "metrics_auth_role",
    "metrics_auth_role_binding",
)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The webhooks' certificate and key, and the authority that the API server is to trust. PEM."""

    authority: bytes
    certificate: bytes
    key: bytes


class Manifests:
    """The objects of one installation. `source` is the folder of Kueue's module.

    `url` is where the webhooks of a manager outside of the cluster listen; without it they are behind a Service.
    """

    def __init__(self, source: Path, *, certificate: Certificate, exempt: Sequence[str], url: str = "") -> None:
        self._components = source / "config" / "components"
        self._certificate = certificate
        self._url = url
        # Namespaces whose pods never go through Kueue, among them that of Kueue itself: it could not start otherwise.
        self._exempt = {
            "matchExpressions": [
                {
                    "key": "kubernetes.io/metadata.name",
                    "operator": "NotIn",
                    "values": sorted({"kube-system", NAMESPACE, *exempt}),
                }
            ]
        }

    def crds(self) -> list[Object]:
        """Return the CRDs, with the conversion between versions that the manager serves."""
        converted = {
            document["metadata"]["name"]: document["spec"]["conversion"]
            for path in sorted((self._components / "crd" / "patches").glob("webhook_in_*.yaml"))
            if self._is_used(path)
            for document in _documents(path)
        }
        found = [
            document
            for path in sorted((self._components / "crd/bases").glob("*.yaml"))
            for document in _documents(path)
        ]
        for crd in found:
            conversion = converted.get(crd["metadata"]["name"])
            if conversion:
                self._point_at_manager(conversion["webhook"]["clientConfig"])
                crd["spec"]["conversion"] = conversion
        return found

    def webhooks(self) -> list[Object]:
        """Return the webhook configurations. Once they are there, no pod is made without the manager's consent."""
        found = []
        for document in _documents(self._components / "webhook" / "manifests.yaml"):
            kept = [entry for entry in document["webhooks"] if _groups(entry) <= {"", "kueue.x-k8s.io"}]
            for entry in kept:
                self._point_at_manager(entry["clientConfig"])
                if "" in _groups(entry):
                    entry["namespaceSelector"] = self._exempt
            found.append(_renamed({**document, "webhooks": kept}))
        return found

    def manager(self, *, image: str) -> list[Object]:
        """Return the manager, its rights, configuration, certificate and service."""
        rights = [
            _renamed(document)
            for name in _RIGHTS
            for document in _documents(self._components / "rbac" / f"{name}.yaml")
        ]
        namespace: Object = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }
        pair = (self._certificate.authority, self._certificate.certificate, self._certificate.key)
        secret = {name: base64.b64encode(value).decode() for name, value in zip(CERTIFICATE_FILES, pair, strict=True)}
        return [
            namespace,
            *rights,
            _namespaced("v1", "Secret", CERTIFICATE, data=secret),
            _namespaced("v1", "ConfigMap", CONFIGURATION, data={"config.yaml": yaml.safe_dump(self.configuration())}),
            _service(),
            self._deployment(image),
        ]

    def configuration(self) -> Object:
        """Return the manager's configuration."""
        return {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "namespace": NAMESPACE,
            "health": {"healthProbeBindAddress": f":{_HEALTH_PORT}"},
            "metrics": {"bindAddress": ":8443"},
            "webhook": {"port": _WEBHOOK_PORT},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": False},
            "integrations": {"frameworks": ["pod"]},
            "managedJobsNamespaceSelector": self._exempt,
            "featureGates": {"VisibilityOnDemand": False},
        }

    def _deployment(self, image: str) -> Object:
        documents = _documents(self._components / "manager" / "manager.yaml")
        found: Object = _renamed(next(document for document in documents if document["kind"] == "Deployment"))
        labels = {"control-plane": "controller-manager"}
        template = found["spec"]["template"]
        found["spec"] |= {"selector": {"matchLabels": labels}, "strategy": {"type": "Recreate"}}
        template["metadata"]["labels"] = labels
        container = template["spec"]["containers"][0]
        probe = {"httpGet": {"path": "/readyz", "port": _HEALTH_PORT}, "periodSeconds": 1}
        mounts = [{"name": "certificate", "mountPath": path, "readOnly": True} for path in _CERTIFICATES]
        container |= {
            "image": image,
            "imagePullPolicy": "Never",
            "args": ["--config=/configuration/config.yaml", "--zap-log-level=2"],
            "readinessProbe": probe,
            "ports": [{"name": "webhook-server", "containerPort": _WEBHOOK_PORT}],
            "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
            "volumeMounts": [*mounts, {"name": "configuration", "mountPath": "/configuration"}],
        }
        template["spec"]["serviceAccountName"] = MANAGER
        # Away from the nodes that tests drain and lose.
        plain = {"matchExpressions": [{"key": "nvidia.com/gpu.product", "operator": "DoesNotExist"}]}
        preferred = [{"weight": 1, "preference": plain}]
        template["spec"]["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
        template["spec"]["volumes"] = [
            {"name": "certificate", "secret": {"secretName": CERTIFICATE}},
            {"name": "configuration", "configMap": {"name": CONFIGURATION}},
        ]
        return found

    def _point_at_manager(self, client: Object) -> None:
        if self._url:
            client["url"] = self._url + client.pop("service").get("path", "/")
        else:
            client["service"] |= {"name": WEBHOOK_SERVICE, "namespace": NAMESPACE}
        client["caBundle"] = base64.b64encode(self._certificate.authority).decode()

    def _is_used(self, patch: Path) -> bool:
        kustomization = yaml.safe_load((self._components / "crd" / "kustomization.yaml").read_text())
        return {"path": f"patches/{patch.name}"} in kustomization["patches"]


def _documents(path: Path) -> Iterator[Object]:
    return (document for document in yaml.safe_load_all(path.read_text()) if document)


def _groups(webhook: Object) -> set[str]:
    return {group for rule in webhook["rules"] for group in rule["apiGroups"]}


def _renamed(value: Object) -> Object:
    """Return the object with Kueue's prefix before its name and those it refers to, in Kueue's namespace."""
    metadata = dict(value["metadata"], name=f"kueue-{value['metadata']['name']}")
    renamed = {**value, "metadata": metadata}
    if "namespace" in metadata:
        metadata["namespace"] = NAMESPACE
    if "roleRef" in value:
        renamed["roleRef"] = dict(value["roleRef"], name=f"kueue-{value['roleRef']['name']}")
    if "subjects" in value:
        renamed["subjects"] = [
            dict(subject, name=f"kueue-{subject['name']}", namespace=NAMESPACE) for subject in value["subjects"]
        ]
    return renamed


def _service() -> Object:
    spec = {"selector": {"control-plane": "controller-manager"}, "ports": [{"port": 443, "targetPort": _WEBHOOK_PORT}]}
    return _namespaced("v1", "Service", WEBHOOK_SERVICE, spec=spec)


def _namespaced(version: str, kind: str, name: str, **content: Any) -> Object:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, **content}
