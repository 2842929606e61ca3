"""`status.pending`: why pods do not run yet, as one cause with a hint. Waiting uses up no attempt.

The judgement is in `waiting`; here it is given what was observed.
"""

from __future__ import annotations

from dataclasses import replace

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.queueing import own_workload
from diffusion_operator.policies.waiting.diagnosis import explain
from diffusion_operator.policies.waiting.facts import Diagnosis, WaitingFacts
from diffusion_operator.state import Case, SeenPod, Surroundings


def why_waiting(case: Case, pods: tuple[SeenPod, ...]) -> Diagnosis | None:
    """Return why these pods of one attempt wait; None where nothing stands in their way that is known of."""
    return _why(_facts(case, pods), case)


def why_preflight_waits(case: Case, pod: SeenPod) -> Diagnosis | None:
    """Return why the pod of a preflight waits, which asks for no GPU."""
    return _why(replace(_facts(case, (pod,)), wanted=1, resource=None, capacity="Any"), case)


def _why(facts: WaitingFacts, case: Case) -> Diagnosis | None:
    found = explain(facts, now=case.now)
    return None if found.cause == WaitingCause.STARTING else found


def _facts(case: Case, pods: tuple[SeenPod, ...]) -> WaitingFacts:
    around = case.seen.around or Surroundings()
    own = {pod.raw["metadata"].get("uid") for pod in pods}
    others = around.pods
    if others is not None:
        others = tuple(pod for pod in others if pod["metadata"].get("uid") not in own)
    resources = case.spec.resources
    workload, position = own_workload(case)
    return WaitingFacts(
        namespace=case.job.namespace,
        pods=tuple(pod.raw for pod in pods),
        wanted=resources.nodes,
        profile=case.profile_name,
        resource=case.profile.resource_name,
        capacity=case.capacity,
        events=(*case.seen.pod_events, *around.claim_events),
        nodes=around.nodes,
        others=others,
        job_ends=around.job_ends,
        workload=workload,
        queue_position=position,
    )
