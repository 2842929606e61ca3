"""`spec.output` and `spec.credentials`: where results go, and who may write there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffusion_api.meta import ApiModel, Cel, LocalName, LocalReference, Uri, cel


class Hub(ApiModel):
    """Upload to the Hugging Face hub."""

    repository: Annotated[str, Field(min_length=3, max_length=96, pattern=r"^[\w.-]+/[\w.-]+$")]
    """`owner/name`."""
    private: bool = True
    """Make the repository private when it is created."""


class Output(ApiModel):
    """Results: weights, samples, curves and, while it runs, checkpoints."""

    destination: Uri
    """Folder that belongs to this job."""
    formats: Annotated[tuple[Literal["Diffusers", "Kohya", "SingleFile"], ...], Field(min_length=1, max_length=3)] = (
        "Diffusers",
    )
    """Formats of the exported weights. Kohya is what AUTOMATIC1111 and ComfyUI load."""
    hub: Hub | None = None
    """Upload to the Hugging Face hub as well."""


class Credentials(ApiModel):
    """How the trainer gets at its storage. Without any field: what the pod's own identity allows."""

    secret_ref: LocalReference | None = None
    """Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, optionally AWS_SESSION_TOKEN, AWS_REGION and
    AWS_ENDPOINT_URL. The trainer reads it as files; the operator never does."""
    service_account_name: LocalName | None = None
    """Service account whose cloud identity the trainer uses (IRSA, EKS Pod Identity, Workload Identity)."""
    endpoint_url: (
        Annotated[
            str,
            Field(
                max_length=1024,
                json_schema_extra=cel(
                    Cel(
                        "self.matches('^https?://[^/]+/?$')",
                        '"\'" + self + "\' is not an endpoint: write http(s)://host[:port] without a path"',
                        expression=True,
                    )
                ),
            ),
        ]
        | None
    ) = None
    """Endpoint of an S3-compatible store; before the Secret's AWS_ENDPOINT_URL."""
