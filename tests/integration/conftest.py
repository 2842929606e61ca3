"""Fixtures that several files of this tier share."""

import pytest

from testkit.warm import WarmTrainers


@pytest.fixture(scope="module")
def trainers():
    """Start trainers within a moment. It ends with the module, so that only those who need it hold its memory."""
    with WarmTrainers() as started:
        yield started
