"""Instants as the Kubernetes API writes them. Nothing here reads a clock."""

from __future__ import annotations

from datetime import UTC, datetime


def to_text(instant: datetime) -> str:
    """Return RFC 3339 in UTC with whole seconds, as in every `metadata` of Kubernetes."""
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def from_text(text: str) -> datetime:
    """Return the instant; fractions of seconds and offsets are understood.

    Raises:
        ValueError: the text is no RFC 3339 instant.
    """
    instant = datetime.fromisoformat(text)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)
