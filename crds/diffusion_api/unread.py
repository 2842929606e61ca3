"""What a method does not read, whatever the family: a job that sets it is told why, and nothing is ignored.

Every default is written into the object when a job is created, so that a value at its default says nothing. Neither
does one that asks for what happens anyway, such as a caption dropout of 0 where there are no captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_api.meta import Cel
from diffusion_api.method import Method


@dataclass(frozen=True)
class Unread:
    """Fields of one section that a method does not read; the section's path ends in `[]` where it is a list of such.

    `idle` has the values of each that ask for nothing, None meaning that it is left out.
    """

    method: Method
    section: str
    idle: Mapping[str, tuple[object, ...]]
    reason: str

    @property
    def sentence(self) -> str:
        """Return what both the API server and `TrainerSpec` say."""
        return f"{self.section}: {self.reason}: leave out {' and '.join(self.idle)}"


_WORDLESS = "method Unconditional trains and draws without words"
_PROMPTED = "with method DreamBooth the caption of every image is dreamBooth.instancePrompt"

UNREAD = (
    Unread(
        "Unconditional",
        "dataset.captions",
        {"default": (None,), "prefix": ("",), "dropout": (0.05, 0.0), "shuffleTags": (False,)},
        _WORDLESS,
    ),
    Unread("Unconditional", "dataset.concepts[]", {"prompt": (None,), "captionDropout": (None, 0.0)}, _WORDLESS),
    Unread("Unconditional", "validation.prompts[]", {"negativePrompt": ("",), "guidanceScale": (7.5, 1.0)}, _WORDLESS),
    Unread("DreamBooth", "dataset.captions", {"default": (None,)}, _PROMPTED),
    Unread("DreamBooth", "dataset.concepts[]", {"prompt": (None,)}, _PROMPTED),
    Unread(
        "TextualInversion",
        "model.textEncoder",
        {"train": (False,)},
        "method TextualInversion trains the vectors of a new word and nothing else",
    ),
    Unread(
        "TextualInversion",
        "training.optimizer",
        {"weightDecay": (0.01, 0.0)},
        "the vectors of a new word are not decayed, which would pull them to where no word is",
    ),
)


def unread(method: Method, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what to say of a spec, as JSON with all its defaults, that sets what its method does not read."""
    for one in UNREAD:
        if one.method == method and any(
            section[name] not in values
            for section in _sections(content, one.section)
            for name, values in one.idle.items()
        ):
            yield one.sentence


def _sections(content: Mapping[str, Any], path: str) -> list[Mapping[str, Any]]:
    found: Any = content
    for name in path.removesuffix("[]").split("."):
        found = found[name]
    return [found] if not path.endswith("[]") else list(found or ())


def unread_rules() -> list[Cel]:
    """Return the CEL rules that say the same. They are looked at when all defaults stand in the object."""
    return [Cel(f"self.method != '{one.method}' || {_idle(one)}", one.sentence) for one in UNREAD]


def _idle(one: Unread) -> str:
    """Return the CEL expression that the fields of a section ask for nothing."""
    listed = one.section.endswith("[]")
    here = f"self.{one.section.removesuffix('[]')}"
    fields = " && ".join(_is_idle(f"{'x' if listed else here}.{name}", values) for name, values in one.idle.items())
    if not listed:
        return f"({fields})"
    return f"!has({here}) || {here}.all(x, {fields})"


def _is_idle(field: str, values: tuple[object, ...]) -> str:
    known = [_literal(value) for value in values if value is not None]
    either = [f"!has({field})"] * (None in values) + [f"{field} in [{', '.join(known)}]"] * bool(known)
    return f"({' || '.join(either)})" if len(either) > 1 else either[0]


def _literal(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
