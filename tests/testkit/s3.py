"""A real S3 server on this machine: versitygw over a folder. Needs neither root nor the cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from testkit import tools
from testkit.process import ServerProcess, free_ports, listening
from testkit.waiting import wait_until


@dataclass(frozen=True, kw_only=True)
class S3Credentials:
    """What a client needs to speak to the server."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str
    region: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that every S3 client reads."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
        }


class S3Server:
    """An S3 server that lives as long as the `with` block.

    `address` is loopback by default; pods reach it when it is an address of the cluster (`cluster.host_ip`). Bucket
    names need three characters, and a key cannot lie below another key (the backend is a folder). `data` outlives the
    server where it is given, so that a restart finds its objects again. Every key is the owner's, who may do all;
    `add_user` adds one who may do what bucket policies allow.
    """

    def __init__(
        self,
        *,
        buckets: Sequence[str] = (),
        address: str = "127.0.0.1",
        port: int = 0,
        data: Path | None = None,
        log: Path | None = None,
    ) -> None:
        self.buckets = tuple(buckets)
        self.address = address
        self._fixed_port = port
        self._fixed_data = data
        self._fixed_log = log
        self._scratch: Path | None = None
        self._process: ServerProcess | None = None
        self._credentials: S3Credentials | None = None

    def start(self) -> S3Credentials:
        """Start it and create the buckets."""
        if self._process is not None:
            raise RuntimeError(f"the S3 server at {self.credentials.endpoint_url} is running already: stop it first")
        program = tools.binary("versitygw")
        self._scratch = Path(tempfile.mkdtemp(prefix="testkit-s3-"))
        data = self._fixed_data or self._scratch / "data"
        for bucket in self.buckets:
            (data / bucket).mkdir(parents=True, exist_ok=True)
        data.mkdir(parents=True, exist_ok=True)
        port = self._fixed_port or free_ports(1, address=self.address)[0]
        self._credentials = S3Credentials(
            endpoint_url=f"http://{self.address}:{port}",
            access_key_id="testkit",
            secret_access_key="testkit-secret",
            region="us-east-1",
        )
        command: list[str | Path] = [
            program,
            "--port",
            f"{self.address}:{port}",
            "--access",
            self._credentials.access_key_id,
        ]
        command += ["--secret", self._credentials.secret_access_key, "--region", self._credentials.region, "--quiet"]
        users = self._scratch / "users"
        users.mkdir()
        command += ["--iam-dir", users, "posix", *_metadata_beside(data), data]
        self._process = ServerProcess(command, log=self._fixed_log or self._scratch / "versitygw.log")
        try:
            wait_until(lambda: self._up(port), describe=f"the S3 server at {self._credentials.endpoint_url}")
        except BaseException:
            self.stop()
            raise
        return self._credentials

    def add_user(self, access_key_id: str, secret_access_key: str) -> S3Credentials:
        """Add a user without any rights of its own and return its credentials; gone when the server stops."""
        own = self.credentials
        admin: list[str | Path] = [
            tools.binary("versitygw"),
            "admin",
            "--access",
            own.access_key_id,
            "--secret",
            own.secret_access_key,
            "--region",
            own.region,
        ]
        user = ["create-user", "--access", access_key_id, "--secret", secret_access_key, "--role", "user"]
        command = [*admin, "--endpoint-url", own.endpoint_url, *user]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"add the user {access_key_id}: {done.stderr or done.stdout}")
        return replace(own, access_key_id=access_key_id, secret_access_key=secret_access_key)

    def stop(self, *, grace_seconds: float = 3) -> None:
        """End it. With `grace_seconds=0` it dies as in a crash."""
        if self._process is not None:
            self._process.stop(grace_seconds=grace_seconds)
        self._process = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = None

    @property
    def credentials(self) -> S3Credentials:
        """Where it listens and with which keys."""
        if self._credentials is None:
            raise RuntimeError("the S3 server has not been started: use it in a `with` block or call start()")
        return self._credentials

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _up(self, port: int) -> bool:
        if self._process is not None:
            self._process.check()
        return listening(self.address, port)


def _metadata_beside(data: Path) -> list[str | Path]:
    """Return the options that keep metadata in files beside `data` where its file system has no extended attributes.

    Attributes are preferred: they come into being together with the object, so that an ETag is never behind it.
    """
    try:
        os.setxattr(data, "user.testkit", b"")
        os.removexattr(data, "user.testkit")
    except (OSError, AttributeError):
        sidecar = data.with_name(data.name + ".metadata")
        sidecar.mkdir(parents=True, exist_ok=True)
        return ["--sidecar", sidecar]
    return []


@contextlib.contextmanager
def refused_endpoint() -> Iterator[str]:
    """Yield an endpoint URL at which nobody listens, and nobody will: for tests of a storage that is down."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
