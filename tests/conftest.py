"""Which tests may run side by side, when they are distributed over processes (`make test`)."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file together, since they share fixtures, and all that use the machine's one cluster.

    The cluster's come first: they take the longest, and wait more than they work.
    """
    items.sort(key=lambda item: not _needs_cluster(item))
    for item in items:
        group = "cluster" if _needs_cluster(item) else str(item.path.relative_to(TESTS))
        item.add_marker(pytest.mark.xdist_group(group))


def _needs_cluster(item: pytest.Item) -> bool:
    return item.path.is_relative_to(TESTS / "e2e")
