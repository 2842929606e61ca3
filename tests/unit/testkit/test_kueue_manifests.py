"""What is made of Kueue's manifests: names, namespaces and certificates agree with each other. Needs no Kueue."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yaml

from testkit.kueue.manifests import Certificate, Manifests

SERVICE = {"service": {"name": "webhook-service", "namespace": "system", "path": "/p"}}
FILES = {
    "crd/kustomization.yaml": [{"patches": [{"path": "patches/webhook_in_used.yaml"}]}],
    "crd/bases/used.yaml": [{"kind": "CustomResourceDefinition", "metadata": {"name": "used"}, "spec": {}}],
    "crd/bases/plain.yaml": [{"kind": "CustomResourceDefinition", "metadata": {"name": "unused"}, "spec": {}}],
    "crd/patches/webhook_in_used.yaml": [
        {"metadata": {"name": "used"}, "spec": {"conversion": {"webhook": {"clientConfig": SERVICE}}}}
    ],
    "crd/patches/webhook_in_unused.yaml": [
        {"metadata": {"name": "unused"}, "spec": {"conversion": {"webhook": {"clientConfig": SERVICE}}}}
    ],
    "webhook/manifests.yaml": [
        {
            "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": "mutating"},
            "webhooks": [
                {"name": name, "clientConfig": SERVICE, "rules": [{"apiGroups": [group]}]}
                for name, group in (("pod", ""), ("queue", "kueue.x-k8s.io"), ("job", "batch"))
            ],
        }
    ],
}
BUNDLE = base64.b64encode(b"authority").decode()


@pytest.fixture
def manifests(tmp_path: Path) -> Manifests:
    for name, documents in FILES.items():
        path = tmp_path / "config" / "components" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump_all(documents))
    certificate = Certificate(authority=b"authority", certificate=b"certificate", key=b"key")
    return Manifests(tmp_path, certificate=certificate, exempt=["ours"])


def test_crds_are_converted_by_the_manager_where_upstream_does_so(manifests: Manifests):
    unused, used = manifests.crds()
    assert "conversion" not in unused["spec"]
    client = used["spec"]["conversion"]["webhook"]["clientConfig"]
    assert client["service"] == {"name": "kueue-webhook-service", "namespace": "kueue-system", "path": "/p"}
    assert client["caBundle"] == BUNDLE


def test_webhooks_of_pods_spare_exempt_namespaces_and_those_of_other_kinds_are_left_out(manifests: Manifests):
    (found,) = manifests.webhooks()
    assert found["metadata"]["name"] == "kueue-mutating"
    pod, queue = found["webhooks"]
    (expression,) = pod["namespaceSelector"]["matchExpressions"]
    assert (expression["operator"], expression["values"]) == ("NotIn", ["kube-system", "kueue-system", "ours"])
    assert "namespaceSelector" not in queue
    assert pod["clientConfig"]["caBundle"] == queue["clientConfig"]["caBundle"] == BUNDLE
