"""Events: about whom, when, and which are still news."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from diffusion_operator.policies.waiting import reading

FRESH = timedelta(minutes=15)
"""Whoever still fails says so again within that time: the kubelet tries mounts every two minutes at the latest, pulls
and sandboxes every five, and Karpenter and the autoscaler repeat their verdicts within five."""
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Said:
    """One event, read."""

    reason: str
    message: str
    at: datetime
    """When it was last seen; the beginning of time where it does not say."""
    first_at: datetime
    kind: str
    about: str
    """Name of the object that it is about."""
    source: str

    def fresh(self, now: datetime, within: timedelta = FRESH) -> bool:
        """Return whether it may still be true."""
        return now - self.at <= within


def read(events: Iterable[Any]) -> list[tuple[Said, Mapping[str, Any]]]:
    """Return the events with the references to what they are about, oldest first, however they came."""
    found = [_read(event) for event in events if isinstance(event, Mapping)]
    return sorted(found, key=lambda pair: (pair[0].at, pair[0].reason, pair[0].message))


def about_pod(events: Iterable[Any], pod: Any) -> list[Said]:
    """Return the events about this very pod, oldest first: a pod of the same name before it has another uid."""
    uid = reading.text(pod, "metadata", "uid")
    wanted = (reading.namespace(pod), reading.name(pod))
    found = []
    for said, reference in read(events):
        if said.kind not in {"Pod", ""}:
            continue
        other = reading.text(reference, "uid")
        if uid and other:
            if uid == other:
                found.append(said)
        elif (reading.text(reference, "namespace"), said.about) == wanted:
            found.append(said)
    return found


def about_claims(events: Iterable[Any]) -> list[Said]:
    """Return the events about Karpenter's NodeClaims, oldest first."""
    return [said for said, _ in read(events) if said.kind == "NodeClaim"]


def newest(events: Iterable[Said], *reasons: str) -> Said | None:
    """Return the newest event of these reasons, from a list that is oldest first."""
    found = [said for said in events if said.reason in reasons]
    return found[-1] if found else None


def _read(event: Mapping[str, Any]) -> tuple[Said, Mapping[str, Any]]:
    reference = reading.mapping(event, "involvedObject") or reading.mapping(event, "regarding")
    times = [
        reading.moment(event, *path)
        for path in (
            ("series", "lastObservedTime"),
            ("lastTimestamp",),
            ("deprecatedLastTimestamp",),
            ("eventTime",),
            ("firstTimestamp",),
            ("metadata", "creationTimestamp"),
        )
    ]
    firsts = [reading.moment(event, "firstTimestamp"), reading.moment(event, "eventTime"), *times]
    said = Said(
        reason=reading.text(event, "reason"),
        message=reading.text(event, "message") or reading.text(event, "note"),
        at=next((found for found in times if found is not None), _NEVER),
        first_at=next((found for found in firsts if found is not None), _NEVER),
        kind=reading.text(reference, "kind"),
        about=reading.text(reference, "name"),
        source=reading.text(event, "source", "component")
        or reading.text(event, "reportingComponent")
        or reading.text(event, "reportingController"),
    )
    return said, reference
