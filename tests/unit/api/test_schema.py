"""The converter keeps what Kubernetes can express and refuses the rest."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from diffusion_api import schema
from diffusion_api.meta import ApiModel


def test_bounds_nullability_and_descriptions_survive():
    class Thing(ApiModel):
        size: Annotated[float, Field(gt=0, le=2)] | None = None
        """How large."""

    assert schema.structural(Thing)["properties"]["size"] == {
        "description": "How large.",
        "type": "number",
        "minimum": 0,
        "exclusiveMinimum": True,
        "maximum": 2,
        "nullable": True,
    }


def test_a_number_or_a_word_is_an_int_or_string_with_a_rule():
    class Thing(ApiModel):
        count: Annotated[int, Field(ge=1, le=9)] | Literal["Auto"] = "Auto"

    made = schema.structural(Thing)["properties"]["count"]
    assert made["x-kubernetes-int-or-string"] is True
    assert made["default"] == "Auto"
    assert made["x-kubernetes-validations"][0]["message"] == "must be Auto or a whole number from 1 to 9"


def test_a_union_that_kubernetes_cannot_express_is_refused():
    class Thing(ApiModel):
        value: int | str = 0

    with pytest.raises(TypeError, match="cannot express"):
        schema.structural(Thing)


def _fields(node, path=""):
    for name, field in node.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from _fields(field.get("items", field), f"{path}.{name}")


@pytest.mark.parametrize("crd", [schema.job_crd(), schema.profile_crd()], ids=lambda c: c["spec"]["names"]["kind"])
def test_every_field_is_described_and_bounded(crd):
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path, field in _fields({"properties": {"spec": root["properties"]["spec"]}}):
        assert field.get("description"), path
        if field.get("type") in {"integer", "number"}:
            assert "minimum" in field, path
        if field.get("type") == "string" and "enum" not in field:
            assert "maxLength" in field, path
        if field.get("type") == "array":
            assert "maxItems" in field, path


def test_the_crd_stays_small_enough_for_client_side_apply():
    import yaml

    assert len(yaml.safe_dump(schema.job_crd())) < 100_000
