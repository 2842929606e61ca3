"""boto3 clients: one for each process, with the settings and credentials that hold out in a long run."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diffusion_trainer.objectstore.credentials import Credentials
from diffusion_trainer.objectstore.settings import TransferSettings

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_AWS_HOSTS = (".amazonaws.com", ".amazonaws.com.cn")
_ANY_REGION = "us-east-1"  # servers other than AWS want one in the signature, and most take any


class S3Connection:
    """How to reach an S3 server. Safe to use from several threads and after a fork."""

    def __init__(
        self, *, credentials: Credentials | None, endpoint_url: str | None, settings: TransferSettings
    ) -> None:
        self.credentials = credentials
        self.settings = settings
        self.endpoint_url = endpoint_url or (credentials and credentials.endpoint_url) or _endpoint_of_environment()
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._owner = 0

    @property
    def is_aws(self) -> bool:
        """Return whether the server is Amazon's own."""
        return self.endpoint_url is None or (urlsplit(self.endpoint_url).hostname or "").endswith(_AWS_HOSTS)

    @property
    def client(self) -> S3Client:
        """Return this process's client; connections are never shared across a fork."""
        with self._lock:
            if self._client is None or self._owner != os.getpid():
                self._client, self._owner = self._made(), os.getpid()
            return self._client

    def _made(self) -> S3Client:
        import boto3
        import botocore.session
        from botocore.config import Config

        bare = botocore.session.get_session()
        if self.credentials is not None:
            _use_folder(bare, self.credentials)
        checksums = (
            {}
            if self.is_aws
            else {
                # The defaults of boto3 >= 1.36 break GCS's interoperability API and many compatible servers.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "s3": {"addressing_style": "path"},
            }
        )
        settings = self.settings
        config = Config(
            retries={"mode": "standard", "max_attempts": settings.retries},
            connect_timeout=settings.connect_timeout_seconds,
            read_timeout=settings.read_timeout_seconds,
            max_pool_connections=max(32, 2 * settings.parallel),
            tcp_keepalive=True,
            user_agent_extra="diffusion-operator",
            **checksums,  # type: ignore[arg-type]
        )
        region = (self.credentials and self.credentials.region) or bare.get_config_variable("region")
        return boto3.Session(botocore_session=bare).client(
            "s3", region_name=region or _ANY_REGION, endpoint_url=self.endpoint_url, config=config
        )


def _endpoint_of_environment() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _use_folder(session: Any, credentials: Credentials) -> None:
    """Make `session` sign with what the folder holds at the moment of signing."""
    from botocore.credentials import CredentialProvider, CredentialResolver, ReadOnlyCredentials
    from botocore.credentials import Credentials as Static

    class FromFolder(Static):
        """Credentials that are read again once their files changed."""

        def __init__(self) -> None:
            self._seen = credentials.version()
            keys = credentials.read()
            super().__init__(keys.access_key_id, keys.secret_access_key, keys.session_token, method="folder")

        def get_frozen_credentials(self) -> ReadOnlyCredentials:
            seen = credentials.version()
            if seen != self._seen:
                keys = credentials.read()
                self.access_key, self.secret_key = keys.access_key_id, keys.secret_access_key
                self.token, self._seen = keys.session_token, seen
            return super().get_frozen_credentials()

    class Provider(CredentialProvider):
        """The only provider of a session that was given a folder."""

        METHOD = "folder"

        def load(self) -> FromFolder:
            return FromFolder()

    session.register_component("credential_provider", CredentialResolver([Provider()]))
