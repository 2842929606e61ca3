"""A situation: how it is made, and why the job waits in it, as its maker knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from testkit.recording.stage import Stage

Maker = Callable[[Stage], None]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """`detail` and `hint` are words that a diagnosis must hold, besides the cause."""

    name: str
    tells: str
    make: Maker
    cause: str
    detail: tuple[str, ...] = ()
    hint: tuple[str, ...] = ()


class Situations(dict[str, Situation]):
    """Situations by name, in the order in which they were told."""

    def add(self, found: Situation) -> None:
        """Add one; a name that is taken is a mistake."""
        if found.name in self:
            raise ValueError(f"situation {found.name} is told twice: give one of them another name")
        self[found.name] = found

    def __call__(self, cause: str, *detail: str, hint: tuple[str, ...] = ()) -> Callable[[Maker], Maker]:
        """Add the function below as a situation: its name, with dashes, and its docstring's first line."""

        def keep(make: Maker) -> Maker:
            name, tells = make.__name__.replace("_", "-"), (make.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")
            self.add(Situation(name=name, tells=tells, make=make, cause=cause, detail=detail, hint=hint))
            return make

        return keep
