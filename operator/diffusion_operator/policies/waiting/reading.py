"""Reading values out of objects that may lack anything or hold nonsense. Nothing here raises."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

_QUANTITY = re.compile(r"^([0-9]{1,18}(?:\.[0-9]{1,18})?)(?:[eE]([+-]?[0-9]{1,2}))?([a-zA-Z]{0,2})$")
_UNITS = {
    "": Decimal(1),
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T", "P", "E"), start=1)},
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)},
}


def dig(value: Any, *path: str) -> Any:
    """Return what stands at the path; None where it leads nowhere."""
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def text(value: Any, *path: str) -> str:
    """Return the string there; empty where there is none."""
    found = dig(value, *path)
    return found if isinstance(found, str) else ""


def mapping(value: Any, *path: str) -> Mapping[str, Any]:
    """Return the object there; empty where there is none. Keys that are no strings are left out."""
    found = dig(value, *path)
    return {key: entry for key, entry in found.items() if isinstance(key, str)} if isinstance(found, Mapping) else {}


def entries(value: Any, *path: str) -> list[Mapping[str, Any]]:
    """Return the objects in the list there; empty where there is none."""
    found = dig(value, *path)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list | tuple) else []


def texts(value: Any, *path: str) -> list[str]:
    """Return the strings in the list there."""
    found = dig(value, *path)
    return [entry for entry in found if isinstance(entry, str)] if isinstance(found, list | tuple) else []


def moment(value: Any, *path: str) -> datetime | None:
    """Return the RFC 3339 time there, in UTC."""
    found = dig(value, *path)
    if isinstance(found, datetime):
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    if not isinstance(found, str):
        return None
    try:
        parsed = datetime.fromisoformat(found)
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def quantity(value: Any) -> Decimal:
    """Return the Kubernetes quantity in its base unit; 0 for what is none."""
    if isinstance(value, bool):
        return Decimal(0)
    match = _QUANTITY.match(str(value)) if isinstance(value, int | float | str) else None
    if match is None or match[3] not in _UNITS:
        return Decimal(0)
    return Decimal(match[1]).scaleb(int(match[2] or 0)) * _UNITS[match[3]]


def shown(amount: Decimal, resource: str) -> str:
    """Return an amount for people: memory and disk in GiB, everything else as a number."""
    if resource in {"memory", "ephemeral-storage"}:
        return f"{amount / _UNITS['Gi']:.1f}Gi"
    return f"{amount:.2f}".rstrip("0").rstrip(".")


def condition(value: Any, kind: str) -> Mapping[str, Any]:
    """Return the status condition of that type; empty where there is none."""
    found = entries(value, "status", "conditions")
    return next((entry for entry in found if entry.get("type") == kind), {})


def name(value: Any) -> str:
    """Return the object's name."""
    return text(value, "metadata", "name")


def namespace(value: Any) -> str:
    """Return the object's namespace."""
    return text(value, "metadata", "namespace")


def names_of(pod: Any) -> dict[str, str]:
    """Return the pod's names as hints show them; what it lacks is left out."""
    found = {"pod": name(pod), "namespace": namespace(pod), "node": text(pod, "spec", "nodeName")}
    return {key: value for key, value in found.items() if value}
