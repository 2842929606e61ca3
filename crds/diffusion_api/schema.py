"""pydantic models -> structural schemas and CustomResourceDefinitions."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from diffusion_api import names
from diffusion_api.job import JobSpec
from diffusion_api.status import JobStatus
from diffusion_api.training_profile import ProfileSpec

Schema = dict[str, Any]

_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "default",
    "nullable",
    "minimum",
    "maximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
    "x-kubernetes-validations",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
)


def structural(model: type[BaseModel], *, defaults: bool = True) -> Schema:
    """Return the structural schema of a model.

    Sections that may be left out default to `{}`, so that the API server writes every default into the object: what a
    job was created with does not change when the operator is upgraded.

    Raises:
        TypeError: for a union that Kubernetes cannot express.
    """
    source = model.model_json_schema(by_alias=True, mode="validation")
    return _Converter(source.pop("$defs", {}), defaults=defaults).convert(source)


class _Converter:
    def __init__(self, definitions: dict[str, Schema], *, defaults: bool) -> None:
        self.definitions = definitions
        self.defaults = defaults

    def convert(self, node: Schema) -> Schema:
        node = self._resolve(node)
        if "anyOf" in node:
            return self._union(node)
        result = {key: node[key] for key in _KEPT if key in node}
        if "const" in node:
            result["enum"] = [node["const"]]
            result["type"] = "string"
        for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if exclusive in node:
                result[bound] = node[exclusive]
                result[exclusive] = True
        if node.get("type") == "object":
            self._object(node, result)
        if node.get("type") == "array":
            result["items"] = self.convert(node.get("items", {}))
        if not self.defaults or result.get("default", 0) is None:
            result.pop("default", None)
        return result

    def _resolve(self, node: Schema) -> Schema:
        """Inline `$ref`; what stands beside it, the field's own description, wins."""
        while "$ref" in node:
            target = self.definitions[node["$ref"].rsplit("/", 1)[-1]]
            node = target | {key: value for key, value in node.items() if key != "$ref"}
        return node

    def _object(self, node: Schema, result: Schema) -> None:
        extra = node.get("additionalProperties")
        if "properties" in node:
            required = node.get("required", [])
            result["properties"] = {
                key: self._property(value, required=key in required) for key, value in node["properties"].items()
            }
        elif isinstance(extra, dict) and extra:
            result["additionalProperties"] = self.convert(extra)
        else:
            result["x-kubernetes-preserve-unknown-fields"] = True

    def _property(self, node: Schema, *, required: bool) -> Schema:
        result = self.convert(node)
        section = result.get("type") == "object" and "properties" in result
        if self.defaults and section and not required and not result.get("nullable"):
            result["default"] = {}
        return result

    def _union(self, node: Schema) -> Schema:
        members = [self._resolve(member) for member in node["anyOf"]]
        beside = {key: value for key, value in node.items() if key != "anyOf"}
        solid = [member for member in members if member.get("type") != "null"]
        if len(solid) == 1 and len(members) == 2:
            return self.convert(solid[0] | beside) | {"nullable": True}
        numbers = [member for member in solid if member.get("type") == "integer"]
        words = [member["const"] for member in solid if "const" in member]
        if len(numbers) == 1 and len(words) == len(solid) - 1 == 1:
            low, high = numbers[0]["minimum"], numbers[0]["maximum"]
            rule = f"type(self) == int ? (self >= {low} && self <= {high}) : self == '{words[0]}'"
            message = f"must be {words[0]} or a whole number from {low} to {high}"
            result = {key: beside[key] for key in _KEPT if key in beside}
            return result | {
                "x-kubernetes-int-or-string": True,
                "x-kubernetes-validations": [{"rule": rule, "message": message}],
            }
        raise TypeError(f"{node}: Kubernetes cannot express this union; use one type")


def job_crd() -> Schema:
    """Return the CustomResourceDefinition of DiffusionTrainingJob."""
    columns = [
        ("Phase", "string", ".status.phase", 0),
        ("Progress", "string", ".status.progress.done", 0),
        ("ETA", "string", ".status.progress.remaining", 0),
        ("GPUs", "integer", ".status.gpus", 0),
        ("Restarts", "integer", ".status.counters.restarts", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Profile", "string", ".spec.resources.profile", 1),
        ("Loss", "number", ".status.progress.loss", 1),
        ("Queue", "string", r".metadata.labels.kueue\.x-k8s\.io/queue-name", 1),
        ("Message", "string", ".status.message", 1),
    ]
    root_rules = [
        {
            "rule": f"self.metadata.name.size() <= {names.MAX_JOB_NAME} && !self.metadata.name.contains('.')",
            "messageExpression": f"\"'\" + self.metadata.name + \"' cannot be a job's name: use at most "
            f'{names.MAX_JOB_NAME} characters and no dots, because pods and hosts are called after it"',
        }
    ]
    version = {
        "selectableFields": [{"jsonPath": ".status.phase"}, {"jsonPath": ".spec.resources.profile"}],
        "additionalPrinterColumns": [_column(*column) for column in columns],
        "subresources": {"status": {}},
    }
    schema = {
        "description": "Training of a diffusion model: data and base model in, weights out.",
        "type": "object",
        "required": ["spec"],
        "properties": _envelope() | {"spec": structural(JobSpec), "status": structural(JobStatus, defaults=False)},
        "x-kubernetes-validations": root_rules,
    }
    return _crd(names.JOB_KIND, names.JOB_PLURAL, names.JOB_SHORT, "Namespaced", version, schema)


def profile_crd() -> Schema:
    """Return the CustomResourceDefinition of TrainingProfile."""
    columns = [
        ("Hardware", "string", ".spec.displayName", 0),
        ("Device", "string", ".spec.device", 0),
        ("Memory", "number", ".spec.memoryGiB", 0),
        ("Max-GPUs", "integer", ".spec.maxGpusPerNode", 0),
        ("Spot", "number", ".spec.price.spot", 0),
        ("On-Demand", "number", ".spec.price.onDemand", 0),
        ("Description", "string", ".spec.description", 1),
    ]
    schema = {
        "description": "Hardware that a platform team offers to training jobs.",
        "type": "object",
        "required": ["spec"],
        "properties": _envelope() | {"spec": structural(ProfileSpec)},
    }
    version: Schema = {"additionalPrinterColumns": [_column(*column) for column in columns]}
    return _crd(names.PROFILE_KIND, names.PROFILE_PLURAL, names.PROFILE_SHORT, "Cluster", version, schema)


def _column(name: str, kind: str, path: str, priority: int) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path}
    return column | ({"priority": priority} if priority else {})


def _envelope() -> Schema:
    return {
        "apiVersion": {"type": "string", "description": f"{names.API_VERSION}"},
        "kind": {"type": "string", "description": "The kind of the object."},
        "metadata": {"type": "object"},
    }


def _crd(kind: str, plural: str, short: str, scope: str, version: Schema, schema: Schema) -> Schema:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": ["training"],
            },
            "scope": scope,
            "versions": [
                {"name": names.VERSION, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
                | version
            ],
        },
    }
