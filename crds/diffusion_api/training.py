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


OptimizerName = Literal["AdamW", "AdamW8bit", "Adafactor", "Prodigy", "Lion"]


class OptimizerDefaults(ApiModel):
    """What stands in for fields of `training.optimizer` that a user leaves out; None: the algorithm has none."""

    beta1: float | None
    beta2: float | None
    epsilon: float | None
    learning_rate: float | None = None
    """Instead of the method's."""
    learning_rate_factor: float = 1
    """Of the method's."""


OPTIMIZER_DEFAULTS: dict[OptimizerName, OptimizerDefaults] = {
    "AdamW": OptimizerDefaults(beta1=0.9, beta2=0.999, epsilon=1e-8),
    "AdamW8bit": OptimizerDefaults(beta1=0.9, beta2=0.999, epsilon=1e-8),
    "Adafactor": OptimizerDefaults(beta1=None, beta2=None, epsilon=1e-30),
    "Prodigy": OptimizerDefaults(beta1=0.9, beta2=0.999, epsilon=1e-8, learning_rate=1),
    "Lion": OptimizerDefaults(beta1=0.9, beta2=0.99, epsilon=None, learning_rate_factor=0.2),
}


class Optimizer(ApiModel):
    """The optimizer."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Cel(
                "!has(self.beta2) || self.name != 'Adafactor'",
                "training.optimizer.beta2 does not belong to Adafactor, whose decay follows from the step: remove it",
            ),
            Cel(
                "!has(self.epsilon) || self.name != 'Lion'",
                "training.optimizer.epsilon does not belong to Lion, which divides by nothing: remove it",
            ),
        )
    )

    name: OptimizerName = "AdamW"
    """Algorithm. AdamW8bit (arXiv 2110.02861) needs less memory, Adafactor (arXiv 1804.04235) still less;
    Lion (arXiv 2302.06675) wants a lower learning rate; Prodigy (arXiv 2306.06101) finds its own, a factor of which
    learningRate then is."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Decoupled weight decay, of what has more than one dimension: not of biases and norms."""
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the first moment. Default 0.9; Adafactor keeps no first moment unless this is set."""
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the second moment. Default 0.999, of Lion (for its only moment) 0.99; Adafactor has none."""
    epsilon: Annotated[float, Field(gt=0, le=1)] | None = None
    """Added to the denominator. Default 1e-8, of Adafactor (to squares) 1e-30; Lion has none."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    """Gradients are scaled down to this norm over all parameters; null turns clipping off."""

    @model_validator(mode="after")
    def _has_what_is_given(self) -> Optimizer:
        if self.beta2 is not None and self.name == "Adafactor":
            raise ValueError(
                "training.optimizer.beta2 does not belong to Adafactor, whose decay follows from the step: remove it"
            )
        if self.epsilon is not None and self.name == "Lion":
            raise ValueError("training.optimizer.epsilon does not belong to Lion, which divides by nothing: remove it")
        return self

    def filled(self) -> Optimizer:
        """Return the same with the algorithm's usual numbers for what was left out."""
        usual = OPTIMIZER_DEFAULTS[self.name]
        given = {name: getattr(self, name) for name in ("beta1", "beta2", "epsilon")}
        return self.model_copy(
            update={name: getattr(usual, name) if value is None else value for name, value in given.items()}
        )


class Ema(ApiModel):
    """Exponential moving average of the trained weights."""

    enabled: bool = False
    """Keep an average and export it instead of the last weights."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    """Decay per optimizer step at most; it grows from 0 as 1 - (1 + step)^-0.75, so that a short run has an average,
    too."""


class NonFinite(ApiModel):
    """What is done when a loss or gradients are no finite numbers. Such a step never changes the weights."""

    policy: Literal["Fail", "RollBack"] = "Fail"
    """What follows when `limit` steps in a row were skipped. Fail ends the job and names the images; RollBack goes
    back to the newest checkpoint and on from there with half the learning rate, at most three times."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 3
    """Steps in a row that are skipped before the policy decides. Overflows that the loss scale of FP16 explains are
    not counted."""


_NO_TERMINAL_SNR = (
    "training.objective.zeroTerminalSNR goes with predictionType VPrediction or Sample, and with no flow: where all is "
    "noise, predicting it says nothing of the image"
)


SNR_GAMMA = 5.0
"""The default of `training.objective.snrGamma`; it stands in every job, and means nothing for a flow."""


class Objective(ApiModel):
    """The loss."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Cel(
                "!has(self.zeroTerminalSNR) || !self.zeroTerminalSNR || !has(self.predictionType) || "
                "!(self.predictionType in ['Epsilon', 'Flow'])",
                _NO_TERMINAL_SNR,
            )
        )
    )

    prediction_type: Literal["Auto", "Epsilon", "VPrediction", "Sample", "Flow"] = "Auto"
    """What the denoiser predicts; Auto reads it from the model's noise scheduler."""
    snr_gamma: Annotated[float, Field(gt=0, le=100)] | None = SNR_GAMMA
    """Min-SNR weighting (arXiv 2303.09556); null weighs all timesteps alike. A flow (SD3) always does, for it is not
    defined there: the default says nothing, and another number is refused."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0
    """Strength of the per-channel constant added to the noise, for darker darks."""
    timestep_sampling: Literal["Auto", "Uniform", "LogitNormal"] = "Auto"
    """How timesteps are drawn; Auto is Uniform for Epsilon, VPrediction and Sample, LogitNormal for Flow."""
    shift: Annotated[float, Field(gt=0, le=100)] | None = None
    """Timestep shift of Flow models; null is the model's own. Above 1, more of the training is at high noise."""
    zero_terminal_snr: bool | None = Field(default=None, alias="zeroTerminalSNR")
    """Rescale the noise schedule so that it ends in nothing but noise (arXiv 2305.08891), for very dark and bright
    pictures. Left out, the schedule is the model's own, which may do so already. Not for Epsilon and Flow."""

    @model_validator(mode="after")
    def _ends_in_noise(self) -> Objective:
        if self.zero_terminal_snr and self.prediction_type in {"Epsilon", "Flow"}:
            raise ValueError(_NO_TERMINAL_SNR)
        return self


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


WHOLE_DREAMBOOTH_LEARNING_RATE = 5e-6
"""Of DreamBooth without an adapter, as in Ruiz et al. 2022 and diffusers' example."""


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
    non_finite: NonFinite = Field(default_factory=NonFinite)
    """Steps whose loss or gradients are no finite numbers."""
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
