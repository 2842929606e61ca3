"""Nodes that are about to go, by a taint of their cloud: the attempt saves and goes on elsewhere without delay.

Clouds give between 15 seconds and two minutes. Who drains the node would come too, later or not at all; every second
before that is one for the checkpoint.
"""

from __future__ import annotations

from diffusion_api.outcomes import OF_CAUSE, Cause
from diffusion_operator.node_state import DEPARTURES
from diffusion_operator.policies.evidence import Ending
from diffusion_operator.policies.stopping import being_stopped, stop
from diffusion_operator.policies.waiting.nodes import untolerated
from diffusion_operator.state import Case, Decision, SeenPod


def leaves_its_node(case: Case) -> Decision | None:
    """Stop the attempt when a node of its is about to go; it ends with cause Preempted, and the next one starts."""
    why = being_stopped(case, Cause.PREEMPTED) or _notice(case)
    return None if why is None else stop(case, why, rule="departure")


def _notice(case: Case) -> Ending | None:
    attempt = case.job.open_attempt
    if attempt is None:
        return None
    pods = case.pods_of(attempt.number)
    if any(pod.deleting or not pod.live(case.now) for pod in pods):
        return None  # it is ending already, and that says why
    leaving = next((pod for pod in pods if _has_to_go(pod)), None)
    if leaving is None:
        return None
    outcome = OF_CAUSE[Cause.PREEMPTED]
    message = f"{outcome.explanation} (node {leaving.node} is about to go: {leaving.node_state.leaving})"
    return Ending(cause=outcome.cause, message=message)


def _has_to_go(pod: SeenPod) -> bool:
    """Return whether its node goes for sure. Pods that tolerate the taint stay: they would come right back."""
    final = [taint for taint in pod.node_state.departures if DEPARTURES[taint["key"]].final]
    return bool(final and untolerated(pod.raw, {"spec": {"taints": final}}))
