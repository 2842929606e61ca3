"""Configuration: read once, refused with the variable's name, its value and a remedy."""

import pytest

from diffusion_api.names import ENV_FAILPOINT
from diffusion_operator.errors import SettingsError
from diffusion_operator.settings import Failpoint, Settings


def test_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings.trainer_image.startswith("ghcr.io/diffusion-operator/trainer:")
    assert (settings.namespaces, settings.http_port, settings.failpoint) == ((), 8080, None)
    assert settings.preflight


def test_everything_can_be_set() -> None:
    settings = Settings.from_environment(
        {
            "DIFFUSION_OPERATOR_TRAINER_IMAGE": "t:1",
            "DIFFUSION_OPERATOR_NAMESPACES": "team-a, team-b",
            "DIFFUSION_OPERATOR_HTTP_PORT": "0",
            "DIFFUSION_OPERATOR_PREFLIGHT": "off",
            "DIFFUSION_OPERATOR_PROGRESS_SECONDS": "0.5",
            "DIFFUSION_OPERATOR_LOG_LEVEL": "debug",
            ENV_FAILPOINT: "write:3:after",
        }
    )
    assert (settings.trainer_image, settings.namespaces, settings.http_port) == ("t:1", ("team-a", "team-b"), 0)
    assert not settings.preflight
    assert (settings.progress_seconds, settings.log_level) == (0.5, "DEBUG")
    assert settings.failpoint == Failpoint(write=3, action="after")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("DIFFUSION_OPERATOR_WORKERS", "many", "write e.g. 8"),
        ("DIFFUSION_OPERATOR_WORKERS", "0", "write 1 to 256"),
        ("DIFFUSION_OPERATOR_LOG_LEVEL", "LOUD", "write DEBUG, INFO"),
        (ENV_FAILPOINT, "write:x:before", "write|delete:<n>:before"),
        (ENV_FAILPOINT, "write:1:during", "write|delete:<n>:before"),
    ],
)
def test_wrong_values_are_refused(name: str, value: str, remedy: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_environment({name: value})
    assert name in str(refused.value)
    assert value in str(refused.value)
    assert remedy in str(refused.value)


def test_the_trainers_failpoints_are_not_the_operators() -> None:
    assert Settings.from_environment({ENV_FAILPOINT: "put:3:before"}).failpoint is None
