"""`spec.resources`, `spec.runPolicy` and the other sections that only the operator reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffusion_api.meta import ApiModel, LocalName, LocalReference

NodeCapacity = Literal["Spot", "OnDemand"]
"""Kind of node that pods are really placed on."""
Capacity = Literal["Spot", "OnDemand", "Any"]
"""What a user asks for; Any is one after the other."""
ShortText = Annotated[str, Field(max_length=253)]
LabelMap = Annotated[dict[str, ShortText], Field(max_length=64)]


MAX_ALTERNATIVES = 4
"""The status keeps the profiles of all of them, and has 8 KiB."""


class Alternative(ApiModel):
    """Another GPU class to use when the first is not to be had."""

    profile: LocalName
    """Name of a TrainingProfile."""
    capacity: Capacity = "OnDemand"
    """As resources.capacity."""


class Resources(ApiModel):
    """What it runs on."""

    profile: LocalName
    """Name of a TrainingProfile; `kubectl get trainingprofiles` lists them."""
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """Pods, each on a node of its own."""
    gpus_per_node: Annotated[int, Field(ge=1, le=16)] = 1
    """GPUs, and so training processes, per pod."""
    capacity: Capacity = "OnDemand"
    """Spot costs less and may be taken away at any time, which costs a job nothing but time. Any is Spot first, and
    OnDemand where no spot node comes within failoverSeconds or three were taken away within an hour."""
    alternatives: Annotated[tuple[Alternative, ...], Field(max_length=MAX_ALTERNATIVES)] = ()
    """Tried in order when the profile has no free GPUs. batchSize stays the same, the micro-batch follows the GPU."""
    failover_seconds: Annotated[int, Field(ge=0, le=86400)] = 300
    """Seconds that an attempt waits for nodes before the next alternative, or OnDemand after Spot, is tried; at most 60
    of them where there is no such node at all. One that was given up is not tried again for half an hour."""


class RunPolicy(ApiModel):
    """Bounds of the whole run."""

    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 3
    """Failures after which the job fails. Preemptions are never counted."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Seconds after which a job that is not done fails; starts anew when a suspended job resumes."""
    pending_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Seconds that an attempt may wait for its pods to run."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """Seconds after which a finished job is deleted. Results in the bucket stay."""
    stall_seconds: Annotated[int, Field(ge=60, le=86400)] = 900
    """Seconds without progress after which an attempt counts as hung."""
    max_gpu_hours: Annotated[float, Field(gt=0, le=10_000_000)] | None = Field(default=None, alias="maxGPUHours")
    """GPU-hours over all attempts after which the job fails."""


class Notification(ApiModel):
    """Somebody to tell."""

    on: Annotated[tuple[Literal["Complete", "Failed", "Stalled"], ...], Field(min_length=1, max_length=3)]
    """When."""
    webhook_ref: LocalReference
    """Secret whose key `url` is posted to."""


class Toleration(ApiModel):
    """A toleration, as in a Pod."""

    key: ShortText | None = None
    """Taint key; left out with operator Exists it matches all."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Exists ignores the value."""
    value: ShortText | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Left out, all effects match."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """Seconds that a NoExecute taint is tolerated."""


class EnvVar(ApiModel):
    """An environment variable with a plain value."""

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Name."""
    value: Annotated[str, Field(max_length=4096)] = ""
    """Value."""


class PodOverrides(ApiModel):
    """The parts of a pod that a user may set; everything else is the profile's and the operator's."""

    node_selector: LabelMap = Field(default_factory=dict)
    """Labels that nodes must have, besides the profile's."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = ()
    """Tolerations, besides the profile's."""
    labels: LabelMap = Field(default_factory=dict)
    """Labels of the pods."""
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=64)] = Field(
        default_factory=dict
    )
    """Annotations of the pods."""
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64)] = ()
    """Environment variables of the trainer."""
    priority_class_name: LocalName | None = None
    """Priority class of the pods."""
    scheduler_name: LocalName | None = None
    """Scheduler other than the cluster's default."""
    image_pull_secrets: Annotated[tuple[LocalReference, ...], Field(max_length=8)] = ()
    """Secrets for pulling the trainer's image."""
