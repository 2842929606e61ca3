"""`spec.managedBy`: whose job it is."""

from __future__ import annotations

from diffusion_api import names
from diffusion_operator.state import Case, Decision


def is_somebody_elses(case: Case) -> Decision | None:
    """Leave jobs of another controller alone. Read raw: it may have rules of its own for the rest of the spec."""
    if (case.job.raw.get("spec") or {}).get("managedBy", names.MANAGER) == names.MANAGER:
        return None
    return Decision(rule="managedBy")
