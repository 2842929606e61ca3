"""Pods that nobody needs any more."""

from __future__ import annotations

from diffusion_operator.state import Case, SeenPod


def leftovers(case: Case, *, of_all: bool = False) -> tuple[SeenPod, ...]:
    """Return the pods to delete: live ones of other attempts, and finished ones but the newest, whose log is kept.

    `of_all` counts live pods of the current attempt as well.
    """
    present = [pod for pod in case.seen.pods if not pod.gone]
    finished = sorted({pod.attempt for pod in present if pod.finished})
    kept = finished[-1] if finished else 0
    found: list[SeenPod] = []
    for pod in present:
        other = of_all or pod.attempt != case.status.attempt
        unwanted = pod.attempt != kept if pod.finished else other
        if unwanted and not pod.deleting:
            found.append(pod)
    return tuple(found)
