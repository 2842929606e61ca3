"""One cluster for all end to end tests of a session; each test has a namespace of its own.

The local cluster by default; that of the current kubectl context with CLUSTER=current; none, and so no test, with
DIFFUSION_OPERATOR_SKIP_CLUSTER=1. Where no local cluster can run the tests fail and say why, so that nothing is green
that did not run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from testkit import installation
from testkit.cluster import ClusterHandle, LocalCluster, leaks, open_current
from testkit.jobs import completed, small_job
from testkit.kube import Object
from testkit.s3 import S3Server

SKIP = "DIFFUSION_OPERATOR_SKIP_CLUSTER"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a cluster; run what starts clusters of its own first, since there is one per machine."""
    for item in items:
        if "shared_cluster" in getattr(item, "fixturenames", ()) or item.get_closest_marker("own_cluster"):
            item.add_marker(pytest.mark.cluster)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))  # whole trainings, maybe on a busy machine
    items.sort(key=lambda item: item.get_closest_marker("own_cluster") is None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "own_cluster: starts local clusters of its own, before the shared one is up")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("own_cluster") and (os.environ.get(SKIP) or os.environ.get("CLUSTER") == "current"):
        pytest.skip("it starts local clusters of its own, and this run is told not to")


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[ClusterHandle]:
    """The cluster; whatever the local one leaves behind at the end fails the session."""
    if os.environ.get(SKIP):
        pytest.skip(f"{SKIP} is set")
    if os.environ.get("CLUSTER") == "current":
        current = open_current()
        yield current
        current.close()
        return
    before = leaks.snapshot()
    with LocalCluster() as cluster:
        yield cluster
    left = leaks.left_behind(before)
    if left:
        pytest.fail("the cluster left behind:\n" + "\n".join(left), pytrace=False)


@dataclass(frozen=True, kw_only=True)
class Platform:
    """diffusion-operator as a platform team would run it, with a bucket that holds a model and images."""

    cluster: ClusterHandle
    s3: S3Server
    operator_namespace: str
    an_image: str  # its key in the bucket team-a


@pytest.fixture(scope="session")
def platform(shared_cluster: ClusterHandle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The operator installed in the cluster, once per session, and the storage that jobs use."""
    with S3Server(address=shared_cluster.host_ip, buckets=installation.BUCKETS) as s3:
        installation.stock(s3, tmp_path_factory.mktemp("stock"))
        namespace = installation.install(shared_cluster)
        keys = [key for key, _ in installation.listing(s3.credentials, "team-a", "cats/")]
        image = next(key for key in keys if key.endswith((".png", ".jpg")))
        yield Platform(cluster=shared_cluster, s3=s3, operator_namespace=namespace, an_image=image)


@contextlib.contextmanager
def a_team(platform: Platform, name: str) -> Iterator[str]:
    """Make a namespace with the Secret that the examples name, and one with a key that the storage refuses."""
    with platform.cluster.namespace(name) as namespace:
        right = installation.secret("team-a-s3", platform.s3.credentials)
        wrong = installation.secret("wrong-s3", platform.s3.credentials, AWS_SECRET_ACCESS_KEY="mistyped")
        platform.cluster.apply(right, wrong, namespace=namespace)
        yield namespace


@pytest.fixture(scope="module")
def module_team(platform: Platform, request: pytest.FixtureRequest) -> Iterator[str]:
    """A team's namespace, shared by the tests of a file."""
    with a_team(platform, request.node.path.stem) as namespace:
        yield namespace


@pytest.fixture(scope="session")
def undisturbed(platform: Platform) -> Iterator[Object]:
    """A job that nothing happens to, complete. Disturbed ones end with its weights."""
    with a_team(platform, "undisturbed") as team:
        platform.cluster.apply(small_job("undisturbed", team), namespace=team)
        yield completed(platform.cluster, "undisturbed", team)


@pytest.fixture
def team(platform: Platform, request: pytest.FixtureRequest) -> Iterator[str]:
    """A team's namespace of the test's own."""
    with a_team(platform, request.node.name) as namespace:
        yield namespace


@pytest.fixture
def cluster(shared_cluster: ClusterHandle) -> Iterator[ClusterHandle]:
    """The cluster, healed after the test: lost nodes are back, cordons and foreign taints are gone."""
    yield shared_cluster
    shared_cluster.heal()


@pytest.fixture
def namespace(cluster: ClusterHandle, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, with Pod Security `restricted` enforced."""
    with cluster.namespace(request.node.name) as name:
        yield name
