"""`spec.training`: how it is trained. Defaults and their sources: docs/reference/api.md."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from diffusion_api.meta import ApiModel, Cel, cel
from diffusion_api.method import Method

AutoOrCount = Annotated[int, Field(ge=1, le=4096)] | Literal["Auto"]


class LRSchedule(ApiModel):
    """Learning rate over the run, a closed form of the optimizer step."""

    name: Literal[
        "Constant", "Linear", "Cosine", "CosineWithRestarts", "Polynomial", "InverseSqrt", "WarmupStableDecay"
    ] = "Cosine"
    """Shape after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Optimizer steps of linear warm-up from 0."""
    cycles: Annotated[int, Field(ge=1, le=1000)] = 1
    """Restarts of CosineWithRestarts."""
    power: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Exponent of Polynomial."""


class Optimizer(ApiModel):
    """The optimizer."""

    name: Literal["AdamW", "AdamW8bit", "Adafactor", "Prodigy", "Lion"] = "AdamW"
    """Algorithm."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the denominator."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    """Gradients are scaled down to this norm over all parameters; null turns clipping off."""


class Ema(ApiModel):
    """Exponential moving average of the trained weights."""

    enabled: bool = False
    """Keep an average and export it instead of the last weights."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    """Decay per optimizer step."""


class Objective(ApiModel):
    """The loss."""

    prediction_type: Literal["Auto", "Epsilon", "VPrediction", "Sample", "Flow"] = "Auto"
    """What the denoiser predicts; Auto reads it from the model's noise scheduler."""
    snr_gamma: Annotated[float, Field(gt=0, le=100)] | None = 5.0
    """Min-SNR weighting (arXiv 2303.09556); null weighs all timesteps alike. Not defined for Flow."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0
    """Strength of the per-channel constant added to the noise, for darker darks."""
    timestep_sampling: Literal["Auto", "Uniform", "LogitNormal"] = "Auto"
    """How timesteps are drawn; Auto is Uniform for Epsilon, VPrediction and Sample, LogitNormal for Flow."""
    shift: Annotated[float, Field(gt=0, le=100)] | None = None
    """Timestep shift of Flow models."""


class MethodDefaults(ApiModel):
    """What stands in for fields of `training` that a user leaves out; sources in docs/reference/api.md."""

    max_steps: int
    batch_size: int
    learning_rate: float


DEFAULTS: dict[Method, MethodDefaults] = {
    "LoRA": MethodDefaults(max_steps=2000, batch_size=4, learning_rate=1e-4),
    "DreamBooth": MethodDefaults(max_steps=800, batch_size=2, learning_rate=1e-4),
    "FineTune": MethodDefaults(max_steps=15000, batch_size=16, learning_rate=1e-5),
    "FromScratch": MethodDefaults(max_steps=550_000, batch_size=2048, learning_rate=1e-4),
    "Unconditional": MethodDefaults(max_steps=100_000, batch_size=64, learning_rate=1e-4),
    "TextualInversion": MethodDefaults(max_steps=3000, batch_size=4, learning_rate=5e-4),
}


class Training(ApiModel):
    """How it is trained."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Cel(
                "!(has(self.maxSteps) && has(self.epochs))",
                "set only one of training.maxSteps and training.epochs",
            )
        )
    )

    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps. At most one of maxSteps and epochs; without both, the method's usual number."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Passes over the dataset."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Images per optimizer step over all GPUs, constant whatever the hardware. Default by method."""
    micro_batch_size: AutoOrCount = "Auto"
    """Images per GPU and forward pass; Auto finds what fits. Gradient accumulation makes up the rest."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Peak learning rate. Default by method."""
    lr_schedule: LRSchedule = Field(default_factory=LRSchedule)
    """Learning rate over the run."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    """The optimizer."""
    mixed_precision: Literal["Auto", "BF16", "FP16", "FP32"] = "Auto"
    """Precision of forward and backward passes; trained weights are kept in fp32. Auto: BF16 where the GPU has it."""
    attention: Literal["Auto", "SDPA", "XFormers"] = "Auto"
    """Attention implementation."""
    gradient_checkpointing: Literal["Auto", "Always", "Never"] = "Auto"
    """Recompute activations in the backward pass: less memory, more time."""
    compile: Literal["Auto", "Always", "Never"] = "Auto"
    """Compile the denoiser's blocks."""
    ema: Ema = Field(default_factory=Ema)
    """Exponential moving average."""
    objective: Objective = Field(default_factory=Objective)
    """The loss."""
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 42
    """Everything random is a function of this number."""
    deterministic: bool = False
    """Bit-equal results on the same GPU model, driver and number of GPUs, at some cost in speed."""

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("set only one of training.maxSteps and training.epochs")
        return self
