"""Complete and Failed are for ever."""

from __future__ import annotations

from diffusion_operator.policies.leftovers import leftovers
from diffusion_operator.state import Case, Decision


def stays_finished(case: Case) -> Decision | None:
    """Only tidy up: the terminal status was written before and is never left."""
    if not case.job.finished:
        return None
    return Decision(rule="finished", delete=leftovers(case, of_all=True))
