"""URIs, keys and credentials: everything of the object store that needs no server."""

from __future__ import annotations

import logging
import os
import pickle
from functools import partial
from pathlib import Path

import pytest

from diffusion_trainer.errors import InvalidKey, InvalidUri, PermissionDenied, UnsupportedScheme
from diffusion_trainer.objectstore import Credentials, join_uri, open_store, split_uri
from diffusion_trainer.objectstore.keys import check_key, check_prefix
from diffusion_trainer.objectstore.s3_client import S3Connection
from diffusion_trainer.objectstore.settings import TransferSettings

SECRET = "sUpErSeCrEt"


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("file:///data/set", "file:///data/set/"),
        ("file:///data/set/", "file:///data/set/"),
        ("FILE:///a%20b/", "file:///a%20b/"),
        ("s3://bucket", "s3://bucket/"),
        ("s3://bucket/", "s3://bucket/"),
        ("s3://bucket/a/b", "s3://bucket/a/b/"),
        ("s3://my.bucket-1/a b/?#/", "s3://my.bucket-1/a b/?#/"),
    ],
)
def test_a_uri_names_a_root(uri: str, root: str) -> None:
    assert open_store(uri).uri == root


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "bucket/prefix",
        "/data",
        "file:/data",
        "file://host/data",
        "file:///a/../b",
        "file:///a%2F..%2Fb",
        "file:///a%00b",
        "s3://",
        "s3:///key",
        "s3://B/",
        "s3://ab/",
        "s3://bucket//a",
        "s3://bucket/a/../b",
        "s3://user:password@bucket/",
    ],
)
def test_what_names_no_root_is_refused_with_what_to_write(uri: str) -> None:
    with pytest.raises(InvalidUri, match=r"write|use segments") as caught:
        open_store(uri)
    assert uri in str(caught.value)


@pytest.mark.parametrize("uri", ["gs://bucket/", "hf://org/model", "https://host/", "az://c/"])
def test_other_schemes_are_named_together_with_the_supported_ones(uri: str) -> None:
    with pytest.raises(UnsupportedScheme, match=r"file:///path/, s3://bucket/prefix/") as caught:
        open_store(uri)
    assert uri in str(caught.value)


def test_uris_are_joined_and_split() -> None:
    assert join_uri("s3://bucket", "a", "b/c") == "s3://bucket/a/b/c/"
    assert join_uri("s3://bucket/p/", "a b") == "s3://bucket/p/a b/"
    assert join_uri("file:///", "a b") == "file:///a%20b/"
    assert open_store(join_uri("file:///x/", "a b")).uri == "file:///x/a%20b/"
    assert split_uri("s3://bucket/models/sd.safetensors") == ("s3://bucket/models/", "sd.safetensors")
    assert split_uri("s3://bucket/sd.safetensors") == ("s3://bucket/", "sd.safetensors")
    assert split_uri("file:///a%20b.safetensors") == ("file:///", "a b.safetensors")
    for uri in ("s3://bucket", "s3://bucket/", "file:///"):
        with pytest.raises(InvalidUri, match="names no object"):
            split_uri(uri)


@pytest.mark.parametrize("key", ["a", "a/b", "..a", "a..b/c", "ä/日本", "a" * 255, "/".join(["a" * 250] * 4)])
def test_keys_that_every_backend_can_hold(key: str) -> None:
    check_key(key)
    check_prefix(key, where="the store")
    check_prefix(key + "/", where="the store")


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("", "empty"),
        ("/a", "absolute"),
        ("a/../b", "'..'"),
        ("a//b", "empty"),
        ("a\x7f", "control"),
        ("\ud800", "Unicode"),
        ("a" * 256, "255"),
        ("a/" * 600 + "a", "1024"),
        (".objectstore-lock", "reserved"),
    ],
)
def test_other_keys_are_refused_with_the_reason(key: str, why: str) -> None:
    with pytest.raises(InvalidKey, match=why):
        check_key(key)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder as kubelet projects it: links into a version, swapped as a whole."""
    swap(tmp_path, "v1", "id1", SECRET)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    return tmp_path


def swap(folder: Path, version: str, key_id: str, key: str) -> None:
    (folder / version).mkdir()
    (folder / version / "AWS_ACCESS_KEY_ID").write_text(key_id + "\n")
    (folder / version / "AWS_SECRET_ACCESS_KEY").write_text(key)
    (folder / "..data_tmp").symlink_to(version)
    (folder / "..data_tmp").rename(folder / "..data")


def test_credentials_are_read_again_when_they_change(secret: Path) -> None:
    credentials = Credentials.from_folder(secret)
    version = credentials.version()
    assert (credentials.read().access_key_id, credentials.read().secret_access_key) == ("id1", SECRET)
    assert credentials.read().session_token is None
    assert credentials.version() == version
    swap(secret, "v2", "id2", "other")
    assert credentials.version() != version
    assert credentials.read().access_key_id == "id2"


def test_the_client_signs_with_the_keys_of_the_moment(secret: Path) -> None:
    connection = S3Connection(
        credentials=Credentials.from_folder(secret), endpoint_url="http://localhost:1", settings=TransferSettings()
    )
    sign = connection.client.generate_presigned_url
    assert "id1" in sign("get_object", {"Bucket": "bucket", "Key": "key"})
    swap(secret, "v2", "id2", "other")
    assert "id2" in sign("get_object", {"Bucket": "bucket", "Key": "key"})


def test_secrets_show_nowhere(secret: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    credentials = Credentials.from_folder(secret)
    opener = partial(open_store, "s3://bucket/", credentials=credentials)
    shown = [repr(credentials), repr(credentials.read()), repr(opener), repr(opener()), caplog.text]
    assert not any(SECRET in text for text in shown)
    assert SECRET.encode() not in pickle.dumps(opener)
    assert pickle.loads(pickle.dumps(opener))().uri == "s3://bucket/"


def test_a_folder_without_the_keys_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text("id")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("\n")
    with pytest.raises(PermissionDenied, match="has no AWS_SECRET_ACCESS_KEY; name a Secret"):
        Credentials.from_folder(tmp_path)
    with pytest.raises(PermissionDenied, match="no AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY"):
        Credentials.from_folder(tmp_path / "absent")


def connection_to(endpoint: str | None, credentials: Credentials | None = None) -> S3Connection:
    return S3Connection(credentials=credentials, endpoint_url=endpoint, settings=TransferSettings())


def test_the_settings_that_matter_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    ours = connection_to("https://minio.example:9000").client.meta.config
    assert ours.retries == {"mode": "standard", "total_max_attempts": 9}
    assert (ours.connect_timeout, ours.read_timeout, ours.max_pool_connections) == (5.0, 30.0, 32)
    assert ours.request_checksum_calculation == "when_required"
    assert ours.response_checksum_validation == "when_required"
    assert ours.s3["addressing_style"] == "path"
    assert ours.tcp_keepalive
    aws = connection_to(None).client.meta.config
    assert aws.request_checksum_calculation == "when_supported"


def test_the_endpoint_is_taken_from_the_call_then_the_secret_then_the_environment(
    secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = Credentials.from_folder(secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://environment")
    assert connection_to(None, credentials).endpoint_url == "http://environment"
    (secret / "AWS_ENDPOINT_URL").write_text("http://secret")
    assert connection_to(None, credentials).endpoint_url == "http://secret"
    assert connection_to("http://call", credentials).endpoint_url == "http://call"
    assert connection_to("https://s3.eu-west-1.amazonaws.com").is_aws
    assert not connection_to("https://amazonaws.com.example.org").is_aws


def test_a_fork_gets_a_client_of_its_own() -> None:
    connection = connection_to("http://localhost:1")
    here = connection.client
    assert connection.client is here
    connection._owner = os.getpid() + 1  # as seen from another process
    assert connection.client is not here
