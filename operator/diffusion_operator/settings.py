"""Configuration, read once from the environment into a frozen value."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from diffusion_api import names
from diffusion_operator.errors import SettingsError

PREFIX = "DIFFUSION_OPERATOR_"


def own_version() -> str:
    """Return the version of the installed distribution, `0.0.0` where it runs from a source tree."""
    try:
        return version("diffusion-operator")
    except PackageNotFoundError:
        return "0.0.0"


@dataclass(frozen=True, kw_only=True)
class Failpoint:
    """Test hook: end the process before or after its n-th write to the API server, counted from 1.

    `deletions` counts only those that delete something.
    """

    write: int
    action: str
    deletions: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operator can be told. A field is the variable DIFFUSION_OPERATOR_<FIELD> unless it says otherwise."""

    trainer_image: str
    """Image of the trainer, for profiles that name none."""
    namespaces: tuple[str, ...] = ()
    """Namespaces to serve, separated by commas; empty means all."""
    http_address: str = "0.0.0.0"  # noqa: S104 - a pod is reached on its own address
    """Address of /metrics and /healthz."""
    http_port: int = 8080
    """Port of /metrics and /healthz; 0 turns both off."""
    preflight: bool = True
    """Whether a pod without a GPU looks at storage, dataset and model before a job's first attempt: ON or OFF."""
    progress_seconds: float = 10
    """Seconds between two questions to a running trainer, with 20 % jitter."""
    status_seconds: float = 15
    """Least seconds between two status writes that only report progress."""
    relist_seconds: float = 300
    """Seconds between two complete readings of the cluster, which catch what a lost watch missed."""
    request_seconds: float = 60
    """Seconds after which a request to the API server that was not answered counts as lost."""
    lease: str = ""
    """Namespace and name, with a slash between them, of the Lease whose holder is the active one of several operators;
    empty where there is never more than one."""
    lease_seconds: int = 15
    """Seconds after its last sign of life until another operator takes over from the active one."""
    identity: str = ""
    """Name of this operator in the Lease, different for each; empty means the host's name, which is the pod's."""
    workers: int = 8
    """Jobs that are worked on at the same time."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    kubeconfig: str | None = None
    """Access from outside of a cluster, from the variable KUBECONFIG; None is kubectl's default."""
    failpoint: Failpoint | None = None
    """Test hook, from the variable that `names.ENV_FAILPOINT` names."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Return the settings.

        Raises:
            SettingsError: a value cannot be used.
        """
        read = _Reader(environment)
        return cls(
            trainer_image=read.text("TRAINER_IMAGE", f"ghcr.io/diffusion-operator/trainer:{own_version()}"),
            namespaces=tuple(part.strip() for part in read.text("NAMESPACES", "").split(",") if part.strip()),
            http_address=read.text("HTTP_ADDRESS", cls.http_address),
            http_port=int(read.number("HTTP_PORT", cls.http_port, at_most=65535)),
            preflight=read.choice("PREFLIGHT", "ON", ("ON", "OFF")) == "ON",
            progress_seconds=read.number("PROGRESS_SECONDS", cls.progress_seconds, at_least=0.05),
            status_seconds=read.number("STATUS_SECONDS", cls.status_seconds),
            relist_seconds=read.number("RELIST_SECONDS", cls.relist_seconds, at_least=1),
            request_seconds=read.number("REQUEST_SECONDS", cls.request_seconds, at_least=0.1),
            lease=read.lease("LEASE"),
            lease_seconds=int(read.number("LEASE_SECONDS", cls.lease_seconds, at_least=1, at_most=3600)),
            identity=read.text("IDENTITY", socket.gethostname()),
            workers=int(read.number("WORKERS", cls.workers, at_least=1, at_most=256)),
            log_level=read.choice("LOG_LEVEL", cls.log_level, ("DEBUG", "INFO", "WARNING", "ERROR")),
            kubeconfig=environment.get("KUBECONFIG") or None,
            failpoint=_failpoint(environment.get(names.ENV_FAILPOINT, "")),
        )


class _Reader:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, name: str, default: str) -> str:
        return self._environment.get(PREFIX + name, "") or default

    def number(self, name: str, default: float, *, at_least: float = 0, at_most: float = 1e9) -> float:
        text = self.text(name, "")
        if not text:
            return default
        try:
            value = float(text)
        except ValueError as error:
            raise SettingsError(f"{PREFIX}{name}: {text!r} is not a number: write e.g. {default:g}") from error
        if not at_least <= value <= at_most:
            raise SettingsError(f"{PREFIX}{name}: {text} is out of range: write {at_least:g} to {at_most:g}")
        return value

    def lease(self, name: str) -> str:
        text = self.text(name, "")
        if text and not re.fullmatch(r"[a-z0-9.-]+/[a-z0-9.-]+", text):
            raise SettingsError(f"{PREFIX}{name}: {text!r} names no Lease: write <namespace>/<name>")
        return text

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        text = self.text(name, default).upper()
        if text not in allowed:
            raise SettingsError(f"{PREFIX}{name}: {text!r} is unknown: write {', '.join(allowed)}")
        return text


def _failpoint(text: str) -> Failpoint | None:
    """Return the operator's failpoint; the variable is shared with the trainer, whose points are left to it."""
    point, _, rest = text.partition(":")
    if point not in {"write", "delete"}:
        return None
    number, _, action = rest.partition(":")
    if not number.isdigit() or action not in {"before", "after"}:
        raise SettingsError(f"{names.ENV_FAILPOINT}: {text!r} is no failpoint: write write|delete:<n>:before|after")
    return Failpoint(write=int(number), action=action, deletions=point == "delete")
