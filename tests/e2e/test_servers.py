"""The servers that tests start beside a cluster: they are real, and they end with whoever started them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import boto3
import pytest
from botocore.client import Config
from botocore.exceptions import ClientError

from testkit.controlplane import ControlPlane
from testkit.kube import ApiError, Kube, KubectlError
from testkit.pods import pod
from testkit.process import listening
from testkit.s3 import S3Server, refused_endpoint
from testkit.waiting import wait_until


@pytest.fixture(scope="module")
def control() -> Iterator[ControlPlane]:
    with ControlPlane() as started:
        yield started


def client(server: S3Server):
    known = server.credentials
    return boto3.client(
        "s3",
        endpoint_url=known.endpoint_url,
        aws_access_key_id=known.access_key_id,
        aws_secret_access_key=known.secret_access_key,
        region_name=known.region,
        config=Config(retries={"max_attempts": 1}),
    )


def test_s3_refuses_a_put_whose_condition_does_not_hold():
    with S3Server(buckets=["team-a"]) as server:
        s3 = client(server)
        tag = s3.put_object(Bucket="team-a", Key="a/b", Body=b"1", IfNoneMatch="*")["ETag"]
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="team-a", Key="a/b", Body=b"2", IfNoneMatch="*")
        s3.put_object(Bucket="team-a", Key="a/b", Body=b"3", IfMatch=tag)
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="team-a", Key="a/b", Body=b"4", IfMatch=tag)
        assert s3.get_object(Bucket="team-a", Key="a/b")["Body"].read() == b"3"


def test_s3_keeps_its_objects_over_a_crash(tmp_path):
    server = S3Server(buckets=["team-a"], data=tmp_path / "data")
    server.start()
    client(server).put_object(Bucket="team-a", Key="key", Body=b"value")
    server.stop(grace_seconds=0)
    with server:
        assert client(server).get_object(Bucket="team-a", Key="key")["Body"].read() == b"value"


def test_nobody_listens_at_the_refused_endpoint():
    with refused_endpoint() as url:
        assert not listening("127.0.0.1", int(url.rpartition(":")[2]))


def test_a_server_ends_with_its_killed_starter():
    program = """
from testkit.s3 import S3Server
server = S3Server()
print(server.start().endpoint_url, flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], env=paths, **pipes) as starter:
        port = int(starter.stdout.readline().rpartition(":")[2])
        assert listening("127.0.0.1", port)
        starter.kill()
    wait_until(lambda: not listening("127.0.0.1", port), describe="the S3 server to end with its starter", timeout=10)


@pytest.mark.apiserver
def test_rights_are_those_that_rbac_gives(control: ControlPlane):
    with control.kube.namespace() as name:
        operator = Kube(
            kubectl=control.kube.kubectl_path,
            kubeconfig=control.service_account_kubeconfig("operator", namespace=name),
        )
        user = Kube(
            kubectl=control.kube.kubectl_path,
            kubeconfig=control.user_kubeconfig("alice", groups=["team-a"]),
        )
        with pytest.raises(ApiError, match=rf"system:serviceaccount:{name}:operator.*cannot list"):
            operator.items("configmaps", namespace=name)
        control.kube.kubectl("create", "role", "reader", "--verb=list", "--resource=configmaps", "-n", name)
        binding = ["create", "rolebinding", "reader", "--role=reader", "-n", name]
        control.kube.kubectl(*binding, f"--serviceaccount={name}:operator", "--group=team-a")
        wait_until(lambda: allowed(operator, name) and allowed(user, name), describe="the rights to be in force")
        operator.close()
        user.close()


def allowed(kube: Kube, namespace: str) -> bool:
    try:
        kube.items("configmaps", namespace=namespace)
    except ApiError as error:
        if error.reason != "Forbidden":
            raise
        return False
    return True


@pytest.mark.apiserver
def test_pods_are_admitted_but_nobody_runs_them(control: ControlPlane):
    with control.kube.namespace() as name:
        control.kube.apply(pod("good", image="x:1"), namespace=name)
        assert control.kube.get("pods", "good", namespace=name)["status"]["phase"] == "Pending"
        bad = pod("bad", image="x:1", hostNetwork=True)
        with pytest.raises(KubectlError, match="violates PodSecurity"):
            control.kube.apply(bad, namespace=name)
        status = {"status": {"phase": "Succeeded"}}
        control.kube.api.patch("pods", "good", status, namespace=name, subresource="status")
        control.kube.wait_phase("good", "Succeeded", namespace=name)


@pytest.mark.apiserver
def test_an_outage_can_be_played(control: ControlPlane):
    options = ["get", "--raw", "/readyz", "--request-timeout=1s"]
    control.pause()
    try:
        with pytest.raises(KubectlError):
            control.kube.kubectl(*options)
    finally:
        control.resume()
    assert control.kube.kubectl(*options) == "ok"
