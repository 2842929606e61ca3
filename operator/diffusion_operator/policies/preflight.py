"""The preflight: a short pod without a GPU looks at storage, dataset, model and destination before the first attempt.

Its tries are numbered by what the status has counted so far, and the number is in the pod's name: so a pod that was
judged is never judged again, and one that was deleted is created again under its name.
"""

from __future__ import annotations

from dataclasses import replace

from diffusion_api import names
from diffusion_api.memory import too_large
from diffusion_api.memory_table import NETWORKS, Architecture
from diffusion_api.outcomes import INFRASTRUCTURE_BUDGET, OF_CAUSE, Action, Cause
from diffusion_api.status import JobStatus
from diffusion_operator.desired import preflight
from diffusion_operator.policies import attempt_ended
from diffusion_operator.policies.attempt_runs import LOOK_AGAIN_SECONDS, LOOK_AROUND_SECONDS
from diffusion_operator.policies.attempt_starts import open_next, resumed
from diffusion_operator.policies.evidence import Ending, ending_of
from diffusion_operator.policies.pending import why_preflight_waits
from diffusion_operator.policies.resources import TOO_LITTLE_MEMORY, offers_of
from diffusion_operator.policies.run_policy import EXHAUSTED, Verdict, backoff_seconds
from diffusion_operator.policies.validation import accepted
from diffusion_operator.state import Case, Decision, SeenPod
from diffusion_operator.status import Value, count, set_condition, set_pending, short

CONDITION = "PreflightPassed"
RULE = "preflight"


def preflight_first(case: Case) -> Decision | None:
    """Run the preflight, and start the first attempt when it has passed. Silent from then on, and where it is off."""
    if not case.seen.preflight or case.status.attempt or case.job.holds(CONDITION):
        return None
    number = tries(case.status)
    pods = [pod for pod in case.pods_of(names.PREFLIGHT_ATTEMPT) if not pod.gone]
    current = next((pod for pod in pods if pod.name == names.preflight_name(case.job.name, number)), None)
    judged = tuple(pod for pod in pods if pod is not current and not pod.deleting)
    if current is None:
        return replace(_starts(case, number), delete=judged)
    if current.ended(case.now):
        return _ended(case, current)
    return replace(_runs(case, current), delete=judged)


def tries(status: JobStatus) -> int:
    """Return how many pods of the preflight have been judged. Before the first attempt nothing else is counted."""
    counters = status.counters
    return counters.preemptions + counters.infrastructure + counters.failures


def _starts(case: Case, number: int) -> Decision:
    manifest = preflight.build(case.job, case.spec, case.profile, number=number, trainer_image=case.seen.trainer_image)
    status = _base(case).model_copy(update={"next_attempt_at": None})
    refusal = case.seen.refusal
    if refusal is None:
        status = _say(case, status, "Unknown", "Starting", f"pod {manifest['metadata']['name']} is being created")
    else:
        status = status.model_copy(update={"pending": case.status.pending})
        status = set_pending(status, cause=refusal.cause, detail=refusal.detail, hint=refusal.hint, now=case.now)
        status = _say(case, status, "Unknown", refusal.cause, f"{refusal.cause}: {refusal.detail}")
    return Decision(rule=RULE, status=status, create=(manifest,))


def _runs(case: Case, pod: SeenPod) -> Decision:
    status = _base(case)
    if pod.deleting:
        status = _say(case, status, "Unknown", "Stopping", f"pod {pod.name} was told to stop")
        return Decision(rule=RULE, status=status, again_seconds=attempt_ended.seconds_to_stuck((pod,), case))
    if pod.phase == "Running":
        return Decision(rule=RULE, status=_say(case, status, "Unknown", "Running", f"pod {pod.name} looks at the job"))
    why = why_preflight_waits(case, pod)
    if why is None:
        status = _say(case, status, "Unknown", "Waiting", f"pod {pod.name} starts")
    else:
        status = status.model_copy(update={"pending": case.status.pending})
        status = set_pending(status, cause=why.cause, detail=why.detail, hint=why.hint, now=case.now)
        status = _say(case, status, "Unknown", why.cause, f"{why.cause}: {why.detail}")
    again = LOOK_AGAIN_SECONDS if pod.waits_on_its_node else LOOK_AROUND_SECONDS
    return Decision(rule=RULE, status=status, again_seconds=again)


def _ended(case: Case, pod: SeenPod) -> Decision:
    ending = _ending(case, pod)
    status = _base(case)
    if ending.cause == Cause.COMPLETED:
        return _passed(case, status, ending)
    verdict = _verdict(case, ending)
    status = count(status, **verdict.counted)
    status = _say(case, status, "False", verdict.reason, verdict.message)
    if verdict.action == Action.FAIL:
        return Decision(rule=RULE, status=attempt_ended.finish(case, status, verdict))
    if verdict.action == Action.BACK_OFF:
        status = attempt_ended.back_off(case, status, verdict).model_copy(update={"phase": "Preflight"})
        return Decision(rule=RULE, status=status, again_seconds=verdict.wait_seconds)
    return Decision(rule=RULE, status=status, again_seconds=0)


def _ending(case: Case, pod: SeenPod) -> Ending:
    if pod.reason == "DeadlineExceeded":
        message = f"the preflight did not end within {preflight.DEADLINE_SECONDS} s; look at the storage's status"
        return Ending(cause=Cause.HANG, message=message)
    return ending_of((pod,), stopped=False, now=case.now)


def _verdict(case: Case, ending: Ending) -> Verdict:
    """Return what follows from a preflight that did not pass; the budgets are those of attempts."""
    action, counters = OF_CAUSE[ending.cause].action, case.status.counters
    verdict = Verdict(action=Action.FAIL, cause=ending.cause, reason=str(ending.cause), message=ending.message)
    if action == Action.FAIL:
        return verdict
    if action == Action.RESUME:
        return replace(verdict, action=Action.RESUME, counted={"preemptions": 1})
    retried = action in {Action.RETRY, Action.RETUNE}
    field, budget = ("failures", case.spec.run_policy.backoff_limit) if retried else _INFRASTRUCTURE
    times = getattr(counters, field) + 1
    verdict = replace(verdict, counted={field: 1})
    if times > budget:
        message = f"the preflight failed {times} times; the last time: {ending.message}"
        return replace(verdict, reason=EXHAUSTED, message=message)
    return replace(verdict, action=Action.BACK_OFF, wait_seconds=backoff_seconds(times))


_INFRASTRUCTURE = ("infrastructure", INFRASTRUCTURE_BUDGET)


def _passed(case: Case, status: JobStatus, ending: Ending) -> Decision:
    report = ending.word.preflight if ending.word else None
    problem = _too_large(case, report.architecture if report else None)
    if problem:
        verdict = Verdict(action=Action.FAIL, cause=Cause.BAD_CONFIG, reason=TOO_LITTLE_MEMORY, message=problem)
        status = _say(case, status, "False", TOO_LITTLE_MEMORY, problem)
        status = _set(case, status, "Validated", "False", TOO_LITTLE_MEMORY, problem)
        return Decision(rule=RULE, status=attempt_ended.finish(case, status, verdict))
    status = status.model_copy(update={"architecture": report.architecture if report else None})
    warnings = "; ".join(ending.word.warnings) if ending.word else ""
    said = ending.word.message if ending.word else "preflight passed"
    status = _say(case, status, "True", "Passed", f"{said}; {warnings}" if warnings else said)
    return open_next(case, status, rule=RULE)


def _too_large(case: Case, architecture: str | None) -> str | None:
    """Return why the model that was found cannot be trained on the GPU of a profile; None where it may be."""
    known: Architecture | None = next((name for name in NETWORKS if name == architecture), None)
    if known is None:
        return None
    offers = ((offer, case.offered(offer.name).gpu_memory_gib) for offer in offers_of(case))
    found = ((offer, too_large(case.spec, family=known, memory_gib=gib)) for offer, gib in offers if gib is not None)
    return next((offer.says(problem) for offer, problem in found if problem), None)


def _base(case: Case) -> JobStatus:
    return resumed(case, accepted(case))


def _say(case: Case, status: JobStatus, value: Value, reason: str, message: str) -> JobStatus:
    status = status.model_copy(update={"phase": "Preflight", "message": short(f"preflight: {message}")})
    return _set(case, status, CONDITION, value, reason, message)


def _set(case: Case, status: JobStatus, kind: str, value: Value, reason: str, message: str) -> JobStatus:
    return set_condition(
        status, kind, value, reason=reason, message=message, generation=case.job.generation, now=case.now
    )
