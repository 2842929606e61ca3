"""A job that is being deleted."""

from __future__ import annotations

from diffusion_operator.state import Case, Decision


def is_being_deleted(case: Case) -> Decision | None:
    """Start nothing. The garbage collector deletes the pods, so no finalizer can ever keep a job from going."""
    if "deletionTimestamp" not in case.job.metadata:
        return None
    return Decision(rule="deletion")
