"""The local cluster is a real one: each promise that other end to end tests build upon."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from testkit.cluster import ClusterError, ClusterHandle, LocalCluster, NodeSpec
from testkit.kube import KubectlError, condition
from testkit.pods import ending, pod
from testkit.s3 import S3Server

KEEP = "testkit.example/keep"
# Blocked first: the kernel does not deliver to the first process of a container what it has no handler for.
BLOCK = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
SLEEP = f"{BLOCK}; signal.sigwait([signal.SIGTERM])"


@pytest.fixture(scope="module")
def python(shared_cluster: ClusterHandle) -> str:
    """An image that runs the Python program given as its argument."""
    return shared_cluster.load_image("testkit/python:1", entrypoint=["python", "-c"])


def test_nodes_have_gpus_labels_and_taints(cluster: ClusterHandle):
    for name, spec in cluster.specs.items():
        node = cluster.get("nodes", name)
        assert condition(node, "Ready")["status"] == "True"
        assert node["status"]["allocatable"].get("nvidia.com/gpu", "0") == str(spec.gpus)
        assert spec.labels.items() <= node["metadata"]["labels"].items()
        assert [t["key"] for t in node["spec"].get("taints", [])] == [t.key for t in spec.parsed_taints]


def test_a_container_runs_the_projects_code_as_nobody_on_a_read_only_root(
    cluster: ClusterHandle, namespace: str, python: str
):
    program = """
import os, sys, diffusion_api, pydantic
assert os.getuid() == 10001, os.getuid()
for path in ("/file", "/usr/file", "/opt/diffusion-operator/crds/file"):
    try:
        open(path, "w")
    except OSError:
        continue
    sys.exit(f"could write {path}")
print("said to the log", flush=True)
open("/dev/termination-log", "w").write("last word")
sys.exit(75)
"""
    cluster.apply(pod("main", image=python, args=[program]), namespace=namespace)
    found = cluster.wait_phase("main", "Failed", namespace=namespace)
    assert cluster.logs("main", namespace=namespace) == "said to the log\n"
    assert ending(found)["exitCode"] == 75
    assert ending(found)["message"] == "last word"


def test_volumes_of_every_kind(cluster: ClusterHandle, namespace: str, python: str):
    cluster.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"key": "from-map"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"key": "from-secret"}},
        namespace=namespace,
    )
    fields = {"items": [{"path": "note", "fieldRef": {"fieldPath": "metadata.labels['note']"}}]}
    token = {"serviceAccountToken": {"path": "token", "audience": "tests", "expirationSeconds": 600}}
    volumes = {
        "disk": {"emptyDir": {}},
        "memory": {"emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        "map": {"configMap": {"name": "settings"}},
        "secret": {"secret": {"secretName": "keys"}},
        "fields": {"downwardAPI": fields},
        "all": {"projected": {"sources": [token, {"secret": {"name": "keys"}}, {"downwardAPI": fields}]}},
    }
    program = """
from pathlib import Path
read = lambda path: Path("/v", path).read_text()
for folder in ("disk", "memory"):
    Path("/v", folder, "file").write_text("x")
mounts = {line.split()[1]: line.split()[2] for line in open("/proc/mounts")}
assert mounts["/v/memory"] == "tmpfs", mounts
assert (read("map/key"), read("secret/key"), read("fields/note")) == ("from-map", "from-secret", "hello")
assert (read("all/key"), read("all/note"), read("all/token").count(".")) == ("from-secret", "hello", 2)
"""
    wanted = pod(
        "main",
        image=python,
        args=[program],
        labels={"note": "hello"},
        mounts=[{"name": name, "mountPath": f"/v/{name}"} for name in volumes],
        volumes=[{"name": name, **source} for name, source in volumes.items()],
        securityContext={"fsGroup": 10001},
    )
    cluster.apply(wanted, namespace=namespace)
    cluster.wait_phase("main", "Succeeded", namespace=namespace)


def test_pod_security_refuses_the_host(cluster: ClusterHandle, namespace: str, python: str):
    wanted = pod("main", image=python, args=["pass"], volumes=[{"name": "host", "hostPath": {"path": "/"}}])
    with pytest.raises(KubectlError, match=r"violates PodSecurity.*hostPath"):
        cluster.apply(wanted, namespace=namespace)


def test_a_token_is_real(cluster: ClusterHandle, namespace: str, python: str):
    program = """
import http.client, ssl
from pathlib import Path
folder = Path("/var/run/secrets/kubernetes.io/serviceaccount")
context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
def ask(token, path):
    connection = http.client.HTTPSConnection("kubernetes.default.svc", context=context)
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    return connection.getresponse().status
token, own = (folder / "token").read_text(), (folder / "namespace").read_text()
codes = ask(token, f"/api/v1/namespaces/{own}/pods"), ask(token, "/api/v1/secrets"), ask("made-up", "/api")
assert codes == (200, 403, 401), codes
"""
    cluster.kubectl("create", "role", "reader", "--verb=list", "--resource=pods", "-n", namespace)
    account = f"--serviceaccount={namespace}:default"
    cluster.kubectl("create", "rolebinding", "reader", "--role=reader", account, "-n", namespace)
    cluster.apply(pod("main", image=python, args=[program]), namespace=namespace)
    cluster.wait_phase("main", "Succeeded", namespace=namespace)


def test_sigterm_comes_first_and_is_given_time(cluster: ClusterHandle, namespace: str, python: str):
    program = """
import sys
print("ready", flush=True)
signal.sigwait([signal.SIGTERM])
open("/dev/termination-log", "w").write("checkpointed")
sys.exit(75)
"""
    wanted = pod("main", image=python, args=[f"{BLOCK}\n{program}"], finalizers=[KEEP])
    cluster.apply(wanted, namespace=namespace)
    cluster.wait_phase("main", "Running", namespace=namespace)
    # Running says that the container was started, not that Python has come as far as to block the signal.
    cluster.wait_log("main", "ready", namespace=namespace)
    cluster.api.delete("pods", "main", namespace=namespace)
    found = cluster.wait_for("pods", "main", ending, namespace=namespace, describe="the end")
    assert (ending(found)["exitCode"], ending(found)["message"]) == (75, "checkpointed")


def test_pods_find_each_other_across_nodes(cluster: ClusterHandle, namespace: str, python: str):
    serve = """
import socket
with socket.create_server(("", 29500)) as server:
    server.accept()[0].sendall(b"hello from the other node")
"""
    ask = """
import socket, time
deadline = time.monotonic() + 30
while True:
    try:
        with socket.create_connection(("rank-0.ranks", 29500), timeout=5) as client:
            assert client.recv(99) == b"hello from the other node"
            break
    except OSError:
        assert time.monotonic() < deadline
        time.sleep(0.2)
"""
    labels = {"job": "ranks"}
    service = {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True}
    cluster.apply(
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "ranks"}, "spec": service},
        *(
            pod(name, image=python, args=[program], labels=labels, hostname=name, subdomain="ranks", nodeName=node)
            for name, program, node in (("rank-0", serve, "cpu-1"), ("rank-1", ask, "rtx-1"))
        ),
        namespace=namespace,
    )
    cluster.wait_phase("rank-1", "Succeeded", namespace=namespace)


def test_pods_reach_servers_of_the_test(cluster: ClusterHandle, namespace: str, python: str):
    program = """
import boto3
client = boto3.client("s3")
client.put_object(Bucket="team-a", Key="key", Body=b"value")
assert client.get_object(Bucket="team-a", Key="key")["Body"].read() == b"value"
"""
    with S3Server(buckets=["team-a"], address=cluster.host_ip) as server:
        wanted = pod("main", image=python, args=[program])
        variables = [{"name": name, "value": value} for name, value in server.credentials.environment.items()]
        wanted["spec"]["containers"][0]["env"] = variables
        cluster.apply(wanted, namespace=namespace)
        cluster.wait_phase("main", "Succeeded", namespace=namespace)


def test_a_higher_priority_preempts(cluster: ClusterHandle, namespace: str, python: str):
    classes = {f"{namespace}-{name}": value for name, value in (("low", 10), ("high", 1000))}
    group = "scheduling.k8s.io/v1"
    for name, value in classes.items():
        cluster.apply({"apiVersion": group, "kind": "PriorityClass", "metadata": {"name": name}, "value": value})
    low, high = classes
    node = {"kubernetes.io/hostname": "rtx-1"}
    try:
        cheap = pod("cheap", image=python, args=[SLEEP], gpus=2, finalizers=[KEEP], nodeSelector=node)
        cheap["spec"]["priorityClassName"] = low
        cluster.apply(cheap, namespace=namespace)
        cluster.wait_phase("cheap", "Running", namespace=namespace)
        dear = pod("dear", image=python, args=["pass"], gpus=2, nodeSelector=node, priorityClassName=high)
        cluster.apply(dear, namespace=namespace)
        evicted = cluster.wait_for("pods", "cheap", ending, namespace=namespace)
        assert condition(evicted, "DisruptionTarget")["reason"] == "PreemptionByScheduler"
        cluster.wait_phase("dear", "Succeeded", namespace=namespace)
    finally:
        cluster.kubectl("delete", "priorityclass", *classes)


def test_drain_evicts(cluster: ClusterHandle, namespace: str, python: str):
    cluster.apply(pod("main", image=python, args=[SLEEP], nodeName="rtx-1", finalizers=[KEEP]), namespace=namespace)
    cluster.wait_phase("main", "Running", namespace=namespace)
    with pytest.raises(KubectlError, match="unable to drain"):  # the finalizer keeps the object
        cluster.drain("rtx-1", timeout_seconds=3)
    found = cluster.wait_for("pods", "main", ending, namespace=namespace)
    assert condition(found, "DisruptionTarget")["reason"] == "EvictionByEvictionAPI"
    assert cluster.get("nodes", "rtx-1")["spec"]["unschedulable"]


def test_a_taint_ends_what_does_not_tolerate_it(cluster: ClusterHandle, namespace: str, python: str):
    cluster.apply(pod("main", image=python, args=[SLEEP], nodeName="rtx-1", finalizers=[KEEP]), namespace=namespace)
    cluster.wait_phase("main", "Running", namespace=namespace)
    cluster.taint("rtx-1", "maintenance=now:NoExecute")
    found = cluster.wait_for("pods", "main", ending, namespace=namespace)
    assert condition(found, "DisruptionTarget")["reason"] == "DeletionByTaintManager"


def test_a_lost_node_is_noticed_and_can_come_back(cluster: ClusterHandle, namespace: str, python: str):
    unreachable = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists"}
    victim = pod(
        "victim",
        image=python,
        args=[SLEEP],
        gpus=2,
        nodeSelector={"kubernetes.io/hostname": "a100-2"},
        tolerations=[gpu, {**unreachable, "tolerationSeconds": 0}],
    )
    cluster.apply(victim, namespace=namespace)
    cluster.wait_phase("victim", "Running", namespace=namespace)
    cluster.lose_node("a100-2")
    cluster.wait_for("nodes", "a100-2", lambda node: condition(node, "Ready")["status"] == "Unknown", timeout=40)
    found = cluster.wait_for(
        "pods", "victim", lambda pod: pod["metadata"].get("deletionTimestamp"), namespace=namespace
    )
    assert condition(found, "DisruptionTarget")["reason"] == "DeletionByTaintManager"
    # Nobody can say whether it still runs, so its object stays, and its GPUs stay taken.
    assert found["status"]["phase"] == "Running"
    cluster.return_node("a100-2")
    cluster.wait_gone("pods", "victim", namespace=namespace)
    again = pod("again", image=python, args=["pass"], gpus=2, nodeSelector={"kubernetes.io/hostname": "a100-2"})
    cluster.apply(again, namespace=namespace)
    cluster.wait_phase("again", "Succeeded", namespace=namespace)


def test_nodes_come_and_go_while_it_runs(cluster: ClusterHandle, namespace: str, python: str):
    cluster.add_node(NodeSpec("late", gpus=8, labels={"pool": "late"}, cpu=1, memory_gib=1))
    try:
        assert cluster.get("nodes", "late")["status"]["allocatable"]["cpu"] == "1"
        wanted = pod("main", image=python, args=["pass"], gpus=8, nodeSelector={"pool": "late"})
        cluster.apply(wanted, namespace=namespace)
        cluster.wait_phase("main", "Succeeded", namespace=namespace)
    finally:
        cluster.remove_node("late")
    assert "late" not in cluster.nodes


def test_a_second_cluster_is_refused(cluster: ClusterHandle):
    assert cluster.specs  # only a local one has them
    with pytest.raises(ClusterError, match=r"up already, started by .*there can be one per machine"):
        LocalCluster().start()


def test_another_process_can_attach(cluster: ClusterHandle):
    assert cluster.specs
    program = "from testkit.cluster import LocalCluster; print(*LocalCluster.attach().nodes)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=_paths())
    assert done.stdout.split() == list(cluster.nodes)


def _paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
