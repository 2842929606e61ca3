"""One cluster for all end to end tests of a session; each test has a namespace of its own.

The local cluster by default; that of the current kubectl context with CLUSTER=current; none, and so no test, with
DIFFUSION_OPERATOR_SKIP_CLUSTER=1. Where no local cluster can run the tests fail and say why, so that nothing is green
that did not run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from testkit.cluster import ClusterHandle, LocalCluster, leaks, open_current

SKIP = "DIFFUSION_OPERATOR_SKIP_CLUSTER"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a cluster; run what starts clusters of its own first, since there is one per machine."""
    for item in items:
        if "shared_cluster" in getattr(item, "fixturenames", ()) or item.get_closest_marker("own_cluster"):
            item.add_marker(pytest.mark.cluster)
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
