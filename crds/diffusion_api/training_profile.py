"""TrainingProfile: hardware that a platform team offers."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from diffusion_api.meta import ApiModel, Cel, Quantity, cel
from diffusion_api.resources import EnvVar, LabelMap, ShortText, Toleration

_MIG_RESOURCE = re.compile(r"/mig-\d+g\.(\d+)gb")
"""Resource of a slice where the device plugin's strategy is `mixed`: nvidia.com/mig-3g.40gb."""
_MIG_PRODUCT = re.compile(r"-MIG-\d+g\.(\d+)gb", re.IGNORECASE)
"""Product label of a sliced GPU where it is `single`: NVIDIA-A100-SXM4-80GB-MIG-3g.40gb, resource nvidia.com/gpu."""


class NodeRequirement(ApiModel):
    """One requirement on a node's labels, as in node affinity."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Cel(
                "!has(self.operator) || self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 : "
                "self.operator in ['Gt', 'Lt'] ? has(self.values) && size(self.values) == 1 && "
                "self.values[0].matches('^-?[0-9]+$') : !has(self.values) || size(self.values) == 0",
                '"requirement on " + self.key + ": In and NotIn need values, Gt and Lt one whole number (GPU memory is '
                'in MiB), Exists and DoesNotExist none"',
                expression=True,
            )
        )
    )

    key: Annotated[str, Field(min_length=1, max_length=317)]
    """Label key, e.g. nvidia.com/gpu.product."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """How the label is compared."""
    values: Annotated[tuple[ShortText, ...], Field(max_length=64)] = ()
    """Accepted values, e.g. several product names."""

    @model_validator(mode="after")
    def _values_suit(self) -> NodeRequirement:
        suited = {
            "In": bool(self.values),
            "NotIn": bool(self.values),
            "Gt": self._is_number,
            "Lt": self._is_number,
        }.get(self.operator, not self.values)
        if not suited:
            raise ValueError(
                f"requirement on {self.key}: In and NotIn need values, Gt and Lt one whole number (GPU memory is in "
                "MiB), Exists and DoesNotExist none"
            )
        return self

    @property
    def _is_number(self) -> bool:
        return len(self.values) == 1 and re.fullmatch(r"-?[0-9]+", self.values[0]) is not None


class SpotPlacement(ApiModel):
    """What makes a node a spot node."""

    node_selector: LabelMap = Field(default_factory=dict)
    """Labels of spot nodes."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = ()
    """Tolerations that spot nodes need."""


class PerGpu(ApiModel):
    """What a pod asks for, per GPU (or per process, without GPUs)."""

    cpu: Quantity = "4"
    """CPU request."""
    memory: Quantity = "32Gi"
    """Memory request and limit."""
    ephemeral_storage: Quantity = "100Gi"
    """Local disk for dataset, cache and checkpoints on their way to the bucket."""


class Price(ApiModel):
    """Price per GPU-hour."""

    currency: Annotated[str, Field(min_length=3, max_length=3, pattern="^[A-Z]{3}$")] = "USD"
    """ISO 4217 code."""
    on_demand: Annotated[float, Field(ge=0, le=100_000)] | None = None
    """On-demand price."""
    spot: Annotated[float, Field(ge=0, le=100_000)] | None = None
    """Spot price."""


class NamespaceSelector(ApiModel):
    """Which namespaces may use the profile."""

    names: Annotated[tuple[ShortText, ...], Field(max_length=256)] = ()
    """By name; empty means every namespace."""


class Limits(ApiModel):
    """Most that one job may ask for."""

    max_gpus: Annotated[int, Field(ge=1, le=1024)] | None = None
    """GPUs over all nodes."""
    max_gpu_hours: Annotated[float, Field(gt=0, le=10_000_000)] | None = Field(default=None, alias="maxGPUHours")
    """GPU-hours over all attempts."""


class ProfileSpec(ApiModel):
    """Hardware that a platform team offers."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Cel(
                "!has(self.device) || self.device != 'CUDA' || has(self.resourceName)",
                "a CUDA profile needs resourceName, e.g. nvidia.com/gpu; for hardware without GPUs set device: CPU",
            )
        )
    )

    display_name: Annotated[str, Field(max_length=128)] = ""
    """Name for people."""
    description: Annotated[str, Field(max_length=1024)] = ""
    """What it is good for."""
    device: Literal["CUDA", "CPU"] = "CUDA"
    """What the trainer computes on. With CUDA a pod without a working GPU fails; it never falls back to the CPU."""
    resource_name: Annotated[str, Field(min_length=1, max_length=317)] | None = None
    """Extended resource that counts the GPUs, e.g. nvidia.com/gpu or nvidia.com/mig-3g.40gb. Left out, no GPU is asked
    for."""
    memory_gi_b: Annotated[float, Field(gt=0, le=4096)] | None = Field(default=None, alias="memoryGiB")
    """Memory of one GPU; left out, it is read from the name of a MIG slice, and else not checked."""
    max_gpus_per_node: Annotated[int, Field(ge=1, le=64)] = 8
    """Most GPUs that one pod can have."""
    node_affinity: Annotated[tuple[NodeRequirement, ...], Field(max_length=16)] = ()
    """Requirements on nodes; all must hold."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = ()
    """Tolerations of the pods."""
    spot: SpotPlacement | None = None
    """How spot nodes are told from others; without it, the profile has no spot capacity."""
    runtime_class_name: Annotated[str, Field(max_length=253)] | None = None
    """Runtime class of the pods."""
    shared_memory: Quantity = "8Gi"
    """Size of /dev/shm."""
    per_gpu: PerGpu = Field(default_factory=PerGpu)
    """What a pod asks for, per GPU."""
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64)] = ()
    """Environment of the trainer, e.g. NCCL settings."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """Trainer image instead of the operator's default."""
    price: Price | None = None
    """Price per GPU-hour."""
    allowed_namespaces: NamespaceSelector = Field(default_factory=NamespaceSelector)
    """Which namespaces may use the profile."""
    limits: Limits = Field(default_factory=Limits)
    """Most that one job may ask for."""
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=3600)] = 120
    """Seconds that a trainer has, when it is told to stop, to finish its step and save. GKE Spot grants 15 at most."""

    @property
    def is_slice(self) -> bool:
        """Whether its GPUs are slices of one (MIG): NCCL cannot train on several of them."""
        return bool(self._slices)

    @property
    def gpu_memory_gib(self) -> float | None:
        """Memory of one GPU: what the profile says, else what the name of its smallest MIG slice does."""
        if self.memory_gi_b is not None or self.device != "CUDA":
            return self.memory_gi_b
        return min(self._slices, default=None)

    @property
    def _slices(self) -> tuple[float, ...]:
        """Gigabytes of the slices that it names."""
        found = [_MIG_RESOURCE.search(self.resource_name or "")]
        found += [
            _MIG_PRODUCT.search(value)
            for requirement in self.node_affinity
            if requirement.operator == "In"
            for value in requirement.values
        ]
        return tuple(float(match[1]) for match in found if match is not None)
