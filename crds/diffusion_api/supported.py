"""What this version honours. A field outside of it is refused with a message, never ignored.

The API is complete in shape from its first version, so that later work fills in behaviour without changing it. Whoever
makes the code honour a value removes or widens its row here, and nothing else has to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusion_api.job import JobSpec


@dataclass(frozen=True)
class Limit:
    """The only values of one field that are honoured so far."""

    path: str
    allowed: tuple[object, ...]


LIMITS = (
    Limit("model.revision", (None,)),
    Limit("dataset.format", ("Auto", "ImageFolder", "Sidecar")),
    Limit("dataset.captions.generate", ("Never",)),
    Limit("dataset.captions.model", (None,)),
    Limit("dataset.filters.safety", ("Keep",)),
    Limit("dataset.filters.minCaptionMatch", (None,)),
    Limit("training.compile", ("Auto", "Never")),
    Limit("output.hub", (None,)),
    Limit("notifications", ([],)),
)

SCHEMES = ("s3",)
"""Locations that a cluster's trainer can read and write."""
LOCAL_SCHEMES = ("s3", "file")
"""Locations that a trainer on the user's own machine can read and write."""

_ABSENT = object()


def unsupported(spec: JobSpec, *, local: bool = False) -> Iterator[tuple[str, object, str]]:
    """Yield (path, value, remedy) of everything that is asked for and not honoured yet.

    `local` accepts file:// locations, which mean nothing in a pod.
    """
    content = spec.model_dump(mode="json", by_alias=True)
    for limit in LIMITS:
        value = _at(content, limit.path)
        if value is not _ABSENT and value not in limit.allowed:
            yield limit.path, value, _remedy(limit)
    if spec.model.source.endswith(".ckpt"):
        yield "model.source", spec.model.source, "convert it to one .safetensors file: a pickle can run code"
    schemes = LOCAL_SCHEMES if local else SCHEMES
    for path, uri in _locations(spec):
        if uri.split("://", maxsplit=1)[0] not in schemes:
            yield path, uri, "use " + " or ".join(f"{scheme}://" for scheme in schemes)


def _locations(spec: JobSpec) -> Iterator[tuple[str, str]]:
    yield "model.source", spec.model.source
    if spec.model.vae is not None:
        yield "model.vae", spec.model.vae
    if spec.model.text_encoder.source is not None:
        yield "model.textEncoder.source", spec.model.text_encoder.source
    if spec.dataset.source is not None:
        yield "dataset.source", spec.dataset.source
    for number, concept in enumerate(spec.dataset.concepts or ()):
        yield f"dataset.concepts[{number}].source", concept.source
    if spec.validation.scores is not None:
        yield "validation.scores.model", spec.validation.scores.model
    yield "output.destination", spec.output.destination


def _remedy(limit: Limit) -> str:
    if limit.allowed in ((None,), ([],)):
        return "leave it out"
    return "use " + " or ".join(_shown(value) for value in limit.allowed)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _at(content: dict[str, Any], path: str) -> object:
    """Return the value at a dotted path, `_ABSENT` where a section on the way is left out."""
    value: Any = content
    for key in path.split("."):
        if value is None:
            return _ABSENT
        value = value[key]
    return value
