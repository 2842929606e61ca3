"""Questions to `decide`: a job and its pods in, a decision out, and the job as it stands after that."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from diffusion_operator.decide import decide
from diffusion_operator.state import Decision, Job, Observed, SeenPod
from diffusion_operator.status import to_object
from testkit.builders import NOW, Object, make_job, make_pod, make_profile


def ask(job: Object, *pods: Object | SeenPod, seconds: float = 0, **seen: Any) -> Decision:
    """Return what is decided so many seconds after NOW."""
    seen.setdefault("profile", make_profile())
    found = tuple(pod if isinstance(pod, SeenPod) else SeenPod(pod) for pod in pods)
    observed = Observed(trainer_image="trainer:1", pods=found, **seen)
    return decide(Job.read(job), observed, now=NOW + timedelta(seconds=seconds))


def after(job: Object, decision: Decision) -> Object:
    """Return the job with the decision's status written."""
    return job | ({"status": to_object(decision.status)} if decision.status is not None else {})


def started(job: Object | None = None) -> Object:
    """Return a job whose first attempt has begun."""
    job = job or make_job()
    return after(job, ask(job))


def running(job: Object | None = None) -> tuple[Object, Object]:
    """Return a job and its running pod."""
    job = started(job)
    pod = make_pod(job, attempt=job["status"]["attempt"], phase="Running", node="n1", status={"podIP": "10.0.0.7"})
    return after(job, ask(job, pod)), pod


def ended(job: Object, status: dict[str, Any], *, phase: str = "Failed", **metadata: Any) -> Object:
    """Return the current attempt's pod after its end."""
    attempt = job["status"]["attempt"]
    return make_pod(job, attempt=attempt, phase=phase, node="n1", status=status, metadata=metadata)


def condition(decision: Decision, kind: str) -> tuple[str, str]:
    """Return status and reason of the condition."""
    assert decision.status is not None
    found = next(entry for entry in decision.status.conditions if entry.type == kind)
    return found.status, found.reason
