"""The base of every model of the contract, and the types that several sections share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.json_schema import SkipJsonSchema

__all__ = [
    "SCHEMES",
    "ApiModel",
    "Cel",
    "LocalName",
    "LocalReference",
    "Quantity",
    "SkipJsonSchema",
    "Timestamp",
    "Uri",
]

SCHEMES = ("s3", "gs", "hf", "pvc", "file")
"""URI schemes of the API. What the running version can really read is in `supported.py`."""


class ApiModel(BaseModel):
    """A frozen, camelCase object that refuses unknown keys. Attribute docstrings are `kubectl explain`."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    def to_json_object(self) -> dict[str, Any]:
        """Return the object as JSON values with camelCase keys, without fields that are null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Cel:
    """A CEL rule that the API server enforces; its Python twin stands beside the model that carries it.

    `message` may be a CEL expression (`expression=True`) so that it can name the value. `field` is the path, below the
    object that carries the rule, that the API server names in its answer.
    """

    def __init__(self, rule: str, message: str, *, expression: bool = False, field: str | None = None) -> None:
        self.rule = rule
        self.message = message
        self.expression = expression
        self.field = field

    def schema(self) -> dict[str, str]:
        """Return the entry of `x-kubernetes-validations`."""
        entry = {"rule": self.rule, "messageExpression" if self.expression else "message": self.message}
        return entry | ({"fieldPath": self.field} if self.field else {})


def cel(*rules: Cel) -> dict[str, Any]:
    """Return the `json_schema_extra` that carries rules into the CRD."""
    return {"x-kubernetes-validations": [rule.schema() for rule in rules]}


_URI_RULES = cel(
    Cel(
        "self.matches('^(s3|gs|hf|pvc|file)://.+')",
        '"\'" + self + "\' is not a location: write s3://bucket/prefix/, gs://bucket/prefix/, hf://owner/name or '
        'pvc://claim/path/"',
        expression=True,
    ),
    Cel(
        "!self.contains('..') && !self.substring(7).contains('//')",
        "\"'\" + self + \"' has an empty or '..' path segment: write the folder's full path\"",
        expression=True,
    ),
)

Uri = Annotated[str, Field(min_length=8, max_length=1024, json_schema_extra=_URI_RULES)]
LocalName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Quantity = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Timestamp = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]


class LocalReference(ApiModel):
    """A reference to an object in the job's own namespace."""

    name: LocalName
    """Name of the object, in the same namespace as the job."""
