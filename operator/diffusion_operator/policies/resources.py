"""`spec.resources.profile`: the hardware that a platform team offers, and to whom."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from pydantic import ValidationError

from diffusion_api.memory import SMALLEST, too_large
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.policies.validation import refused
from diffusion_operator.state import Case, Decision


def profile_refuses(case: Case) -> Decision | None:
    """Say why the profile cannot be used. From the first attempt on its snapshot counts, and this rule is silent."""
    if case.snapshot is not None:
        return None
    reason, problem, hint = next(_refusals(case), ("", "", ""))
    if not reason:
        return None
    return Decision(rule="profile", status=refused(case, reason=reason, problems=(problem,), hint=hint, remedy=hint))


def _refusals(case: Case) -> Iterator[tuple[str, str, str]]:
    """Yield (reason, problem, hint)."""
    wanted = case.spec.resources.profile
    field = f"spec.resources.profile: {wanted}"
    if case.seen.profile is None:
        yield "ProfileNotFound", f"{field}: there is no such TrainingProfile{_suggestion(case)}", _LIST
        return
    try:
        profile = case.profile
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        yield "ProfileInvalid", f"{field}: the profile's spec.{where} is wrong: {first['msg']}", _ASK
        return
    allowed = profile.allowed_namespaces.names
    if allowed and case.job.namespace not in allowed:
        yield "ProfileNotAllowed", f"{field}: namespace {case.job.namespace} may not use it", _ASK
    yield from _too_much(case, profile, field)
    smallest = SMALLEST.get(case.spec.model.family)
    if smallest and profile.memory_gi_b and profile.device == "CUDA":
        problem = too_large(case.spec, family=smallest, memory_gib=profile.memory_gi_b)
        if problem:
            yield TOO_LITTLE_MEMORY, f"{field}: {problem}", "create the job anew with one of the changes in the message"


def _too_much(case: Case, profile: ProfileSpec, field: str) -> Iterator[tuple[str, str, str]]:
    resources = case.spec.resources
    total, limit = case.processes, profile.limits.max_gpus
    if resources.gpus_per_node > profile.max_gpus_per_node:
        problem = f"spec.resources.gpusPerNode: {resources.gpus_per_node}: {field} has {profile.max_gpus_per_node}"
        yield "ProfileLimit", problem, "ask for fewer GPUs per node"
    if limit is not None and total > limit:
        problem = f"spec.resources: {total} GPUs over all nodes: {field} allows {limit} per job"
        yield "ProfileLimit", problem, "ask for fewer GPUs"
    if resources.capacity == "Spot" and profile.spot is None:
        problem = f"spec.resources.capacity: Spot: {field} has no spot nodes"
        yield "ProfileWithoutSpot", problem, "set capacity: OnDemand or Any, or use another profile"


TOO_LITTLE_MEMORY = "InsufficientGPUMemory"
_LIST = "kubectl get trainingprofiles lists what there is"
_ASK = "ask who runs the cluster, or use another profile: kubectl get trainingprofiles"


def _suggestion(case: Case) -> str:
    known = case.seen.profile_names
    close = difflib.get_close_matches(case.spec.resources.profile, known, n=1)
    if close:
        return f", did you mean {close[0]}?"
    return f"; there are {', '.join(sorted(known)[:10])}" if known else "; there is none at all"
