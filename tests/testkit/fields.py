"""The fields of the contract, by their paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel


def optional(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Yield the paths of fields that have a default, in a section and in those in it; `[]` behind those of lists."""
    for name, field in section.model_fields.items():
        parts = list(_flat(field.annotation))
        inner = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
        listed = any(get_origin(part) is tuple for part in parts)
        here = path + (field.alias or name)
        if inner is not None:
            yield from optional(inner, f"{here}{'[].' if listed else '.'}")
        if (inner is None or listed) and not field.is_required():
            yield here


def _flat(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all that it is made of."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _flat(part)
