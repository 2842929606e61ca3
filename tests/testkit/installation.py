"""diffusion-operator in a cluster, with the storage, the model and the images that a first job needs.

What the demo and the end to end tests start from: the very manifests of `examples/install/`, images that run the
Dockerfile's entrypoints as the Dockerfile's users, and a bucket with a tiny model of the real classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import yaml

from diffusion_api import names
from testkit import tiny
from testkit.cluster import ClusterHandle
from testkit.cluster.images import python_env
from testkit.kube import condition
from testkit.s3 import S3Credentials, S3Server

ROOT = Path(__file__).resolve().parents[2]
OPERATOR_MANIFEST = ROOT / "examples" / "install" / "operator.yaml"
PROFILES = Path(__file__).parent / "manifests" / "profiles.yaml"
BUCKETS = ("models", "team-a")
OPERATOR_USER = "65532"
TRAINER_USER = "10001"


def install(cluster: ClusterHandle) -> str:
    """Install CRDs, profiles and operator, wait until it is up, and return its namespace."""
    for file in sorted((ROOT / "crds").glob("*.yaml")):
        cluster.kubectl("apply", "--server-side", "-f", file)
    cluster.wait_established(*(f"{plural}.{names.GROUP}" for plural in (names.JOB_PLURAL, names.PROFILE_PLURAL)))
    cluster.kubectl("apply", "-f", PROFILES)
    deployment = _deployment()
    namespace = str(deployment["metadata"]["namespace"])
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    trainer = next(entry["value"] for entry in container["env"] if "IMAGE" in entry["name"])
    for image, module, user in (
        (container["image"], "diffusion_operator", OPERATOR_USER),
        (trainer, "diffusion_trainer", TRAINER_USER),
    ):
        cluster.load_image(image, entrypoint=["python", "-m", module], env=python_env(), user=user)
    cluster.kubectl("apply", "-f", OPERATOR_MANIFEST)
    name = deployment["metadata"]["name"]
    cluster.wait_for(
        "deployments",
        name,
        lambda found: condition(found, "Available").get("status") == "True",
        namespace=namespace,
        timeout=90,
        describe="the operator to be up",
    )
    return namespace


def _deployment() -> dict[str, Any]:
    documents = yaml.safe_load_all(OPERATOR_MANIFEST.read_text())
    return next(document for document in documents if document["kind"] == "Deployment")


def stock(s3: S3Server, work: Path) -> None:
    """Put a tiny Stable Diffusion model and a small captioned image set into the buckets."""
    tiny.make_tiny_sd1(work / "model", unet=tiny.LARGE_PICTURES)
    upload(s3.credentials, work / "model", "models", "sd-v1-5/")
    tiny.make_image_folder(work / "cats", 12, sizes=((512, 512), (640, 448), (448, 640)))
    upload(s3.credentials, work / "cats", "team-a", "cats/")


def upload(credentials: S3Credentials, folder: Path, bucket: str, prefix: str) -> None:
    """Put every file of a folder below a prefix."""
    client = s3_client(credentials)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.put_object(Bucket=bucket, Key=prefix + str(file.relative_to(folder)), Body=file.read_bytes())


def s3_client(credentials: S3Credentials) -> Any:
    """Return an S3 client with the rights of the server's owner."""
    return boto3.client(
        "s3",
        endpoint_url=credentials.endpoint_url,
        aws_access_key_id=credentials.access_key_id,
        aws_secret_access_key=credentials.secret_access_key,
        region_name=credentials.region,
    )


def listing(credentials: S3Credentials, bucket: str, prefix: str) -> list[tuple[str, int]]:
    """Return (key, size in bytes) of everything below a prefix, sorted."""
    pages = s3_client(credentials).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return sorted((item["Key"], item["Size"]) for page in pages for item in page.get("Contents", []))


def secret(name: str, credentials: S3Credentials, **changed: str) -> dict[str, Any]:
    """Return the Secret that `spec.credentials.secretRef` names."""
    keys = {
        "AWS_ACCESS_KEY_ID": credentials.access_key_id,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_access_key,
        "AWS_REGION": credentials.region,
        "AWS_ENDPOINT_URL": credentials.endpoint_url,
    }
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": keys | changed}
