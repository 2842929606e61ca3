"""Which tests may run side by side, when they are distributed over processes (`make test`)."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file together, since they share fixtures, and all that use the machine's one cluster."""
    for item in items:
        file = item.path.relative_to(TESTS)
        group = "cluster" if file.parts[0] == "e2e" else str(file)
        item.add_marker(pytest.mark.xdist_group(group))
