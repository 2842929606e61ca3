"""Why a job's pods do not run (`status.pending.cause`); what each cause means is in `waiting_table.py`.

The order of `WaitingCause` is the precedence between the pods of one job: the pod whose cause stands first speaks.
What nobody can wait out comes before what passes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class WaitingCause(StrEnum):
    """Why a pod does not run yet."""

    QUOTA_EXCEEDED = "QuotaExceeded"
    POD_SECURITY_REJECTED = "PodSecurityRejected"
    MISSING_SERVICE_ACCOUNT = "MissingServiceAccount"
    MISSING_PRIORITY_CLASS = "MissingPriorityClass"
    MISSING_RUNTIME_CLASS = "MissingRuntimeClass"
    POD_NAME_TAKEN = "PodNameTaken"
    SERVICE_NAME_TAKEN = "ServiceNameTaken"
    ADMISSION_REJECTED = "AdmissionRejected"
    MISSING_SECRET = "MissingSecret"  # noqa: S105 - a cause
    MISSING_PERSISTENT_VOLUME_CLAIM = "MissingPersistentVolumeClaim"
    VOLUME_BINDING = "VolumeBinding"
    MOUNT_FAILED = "MountFailed"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    SANDBOX_FAILED = "SandboxFailed"
    QUEUE_MISSING = "QueueMissing"
    QUEUE_STOPPED = "QueueStopped"
    WORKLOAD_DEACTIVATED = "WorkloadDeactivated"
    QUEUE_MISCONFIGURED = "QueueMisconfigured"
    EXCEEDS_MAX_QUOTA = "ExceedsMaxQuota"
    NO_MATCHING_FLAVOR = "NoMatchingFlavor"
    TOPOLOGY_PLACEMENT_FAILED = "TopologyPlacementFailed"
    WAITING_FOR_ADMISSION_CHECK = "WaitingForAdmissionCheck"
    WAITING_FOR_PODS_READY = "WaitingForPodsReady"
    WAITING_FOR_QUOTA = "WaitingForQuota"
    GATED = "Gated"
    NO_SUCH_NODE = "NoSuchNode"
    TAINT_OR_SELECTOR_MISMATCH = "TaintOrSelectorMismatch"
    SPOT_UNAVAILABLE = "SpotUnavailable"
    CAPACITY_UNAVAILABLE = "CapacityUnavailable"
    AUTOSCALER_REFUSED = "AutoscalerRefused"
    NODE_NOT_READY = "NodeNotReady"
    NODE_CORDONED = "NodeCordoned"
    INSUFFICIENT_CPU_OR_MEMORY = "InsufficientCpuOrMemory"
    FRAGMENTED = "Fragmented"
    INSUFFICIENT_GPU = "InsufficientGPU"
    GANG_INCOMPLETE = "GangIncomplete"
    PREEMPTING_OTHERS = "PreemptingOthers"
    NODE_PROVISIONING = "NodeProvisioning"
    UNKNOWN = "Unknown"
    IMAGE_PULL = "ImagePull"
    STARTING = "Starting"


@dataclass(frozen=True)
class Wait:
    """One row: a cause, or one variant of it that asks for another remedy."""

    cause: WaitingCause
    variant: str
    """Empty for the cause itself."""
    explanation: str
    """What it means, for a person."""
    hint: str
    """What the person can do; `{name}` stands for what was found."""


RANK: dict[WaitingCause, int] = {cause: rank for rank, cause in enumerate(WaitingCause)}
"""Precedence between the pods of one job: the lowest speaks."""
