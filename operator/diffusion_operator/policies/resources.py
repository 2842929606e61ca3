"""`spec.resources`: the hardware that a platform team offers, to whom, and whether the job can run on all it names."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from diffusion_api.memory import SMALLEST, too_large
from diffusion_api.resources import Capacity
from diffusion_api.training_profile import ProfileSpec
from diffusion_operator.policies.choices import asked
from diffusion_operator.policies.validation import refused
from diffusion_operator.state import Case, Decision


@dataclass(frozen=True)
class Offer:
    """One profile that the job names."""

    field: str
    """Where: `spec.resources.profile` or `spec.resources.alternatives[0].profile`."""
    name: str
    capacity: Capacity

    @property
    def section(self) -> str:
        """The field around it."""
        return self.field.removesuffix(".profile")

    def says(self, problem: str) -> str:
        """Return the problem as a sentence about the profile."""
        return f"{self.field}: {self.name}: {problem}"


def offers_of(case: Case) -> tuple[Offer, ...]:
    """Return what the job names, the first choice first."""
    first, *others = asked(case.spec.resources)
    sections = ["spec.resources", *(f"spec.resources.alternatives[{index}]" for index in range(len(others)))]
    return tuple(
        Offer(f"{section}.profile", name, capacity)
        for section, (name, capacity) in zip(sections, (first, *others), strict=True)
    )


def profile_refuses(case: Case) -> Decision | None:
    """Say why a profile cannot be used. From the first attempt on snapshots count, and this rule is silent.

    An alternative that cannot be used refuses the job as the first choice does: it would fail later and elsewhere.
    """
    if case.snapshots:
        return None
    found = (refusal for offer in offers_of(case) for refusal in _refusals(case, offer))
    reason, problem, hint = next(found, ("", "", ""))
    if not reason:
        return None
    return Decision(rule="profile", status=refused(case, reason=reason, problems=(problem,), hint=hint, remedy=hint))


def _refusals(case: Case, offer: Offer) -> Iterator[tuple[str, str, str]]:
    """Yield (reason, problem, hint)."""
    if offer.name not in {case.spec.resources.profile if case.seen.profile else None, *case.seen.alternatives}:
        problem = f"{offer.field}: {offer.name}: there is no such TrainingProfile{_suggestion(case, offer.name)}"
        yield "ProfileNotFound", problem, _LIST
        return
    try:
        profile = case.offered(offer.name)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        yield "ProfileInvalid", offer.says(f"the profile's spec.{where} is wrong: {first['msg']}"), _ASK
        return
    allowed = profile.allowed_namespaces.names
    if allowed and case.job.namespace not in allowed:
        yield "ProfileNotAllowed", offer.says(f"namespace {case.job.namespace} may not use it"), _ASK
    yield from _too_much(case, profile, offer)
    yield from _unlike(case, profile, offer)
    smallest = SMALLEST.get(case.spec.model.family)
    if smallest and profile.gpu_memory_gib:
        too_little = too_large(case.spec, family=smallest, memory_gib=profile.gpu_memory_gib)
        if too_little:
            hint = "create the job anew with one of the changes in the message"
            yield TOO_LITTLE_MEMORY, offer.says(too_little), hint


def _too_much(case: Case, profile: ProfileSpec, offer: Offer) -> Iterator[tuple[str, str, str]]:
    resources = case.spec.resources
    total, limit = case.processes, profile.limits.max_gpus
    whose = f"{offer.field}: {offer.name}"
    if resources.gpus_per_node > profile.max_gpus_per_node:
        problem = f"spec.resources.gpusPerNode: {resources.gpus_per_node}: {whose} has {profile.max_gpus_per_node}"
        yield "ProfileLimit", problem, "ask for fewer GPUs per node"
    if limit is not None and total > limit:
        problem = f"spec.resources: {total} GPUs over all nodes: {whose} allows {limit} per job"
        yield "ProfileLimit", problem, "ask for fewer GPUs"
    if profile.is_slice and total > 1:
        problem = f"spec.resources: {total} GPUs over all nodes: {whose} offers slices of GPUs (MIG), which NCCL cannot"
        yield "ProfileLimit", f"{problem} train on together", "set nodes: 1 and gpusPerNode: 1, or use whole GPUs"
    if offer.capacity == "Spot" and profile.spot is None:
        problem = f"{offer.section}.capacity: Spot: {whose} has no spot nodes"
        yield "ProfileWithoutSpot", problem, "set capacity: OnDemand or Any, or use another profile"


def _unlike(case: Case, profile: ProfileSpec, offer: Offer) -> Iterator[tuple[str, str, str]]:
    """Yield why the profile is no alternative to the first: a job does not go from GPUs to CPUs under way."""
    first = case.offered(case.spec.resources.profile)
    if profile.device != first.device:
        problem = f"it has device {profile.device}, and spec.resources.profile {case.spec.resources.profile} "
        yield "ProfileUnlike", offer.says(f"{problem}{first.device}"), "name alternatives with the same device"


TOO_LITTLE_MEMORY = "InsufficientGPUMemory"
_LIST = "kubectl get trainingprofiles lists what there is"
_ASK = "ask who runs the cluster, or use another profile: kubectl get trainingprofiles"


def _suggestion(case: Case, name: str) -> str:
    known = case.seen.profile_names
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f", did you mean {close[0]}?"
    return f"; there are {', '.join(sorted(known)[:10])}" if known else "; there is none at all"
