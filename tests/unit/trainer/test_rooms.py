"""The rooms whose parts are imported on first use say the same thrice: to the type checker, in `__all__`, and here."""

import pytest

from diffusion_trainer import data, models


@pytest.mark.parametrize("room", [data, models], ids=["data", "models"])
def test_everything_that_is_exported_can_be_imported(room):
    listed = [name for names in room._ROOMS.values() for name in names]
    assert sorted(listed) == sorted(room.__all__)
    assert all(getattr(room, name).__name__ == name for name in room.__all__)


def test_a_name_that_is_none_is_refused():
    with pytest.raises(AttributeError, match=r"'diffusion_trainer\.data' has no attribute 'nothing'"):
        _ = data.nothing
