"""`spec.validation` and `spec.checkpoint`, `spec.tracking`: what is looked at and kept on the way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffusion_api.meta import ApiModel, Uri


class SamplePrompt(ApiModel):
    """One picture of the sample grid."""

    prompt: Annotated[str, Field(max_length=1024)]
    """What to draw."""
    negative_prompt: Annotated[str, Field(max_length=1024)] = ""
    """What to keep away from."""
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 1
    """Seed of the starting noise, so that grids can be compared."""
    guidance_scale: Annotated[float, Field(ge=0, le=50)] = 7.5
    """Classifier-free guidance."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 30
    """Denoising steps."""


class EarlyStopping(ApiModel):
    """Stop when the validation loss no longer falls."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 4
    """Evaluations without improvement before stopping."""
    min_delta: Annotated[float, Field(ge=0, le=1)] = 0.002
    """Least relative improvement that counts."""


class Scores(ApiModel):
    """What a CLIP model says of pictures that are drawn with the weights of the moment: CLIP score and KID."""

    model: Uri
    """Folder of a CLIP model as transformers writes it: config.json, preprocessor_config.json, the tokenizer,
    model.safetensors."""
    images: Annotated[int, Field(ge=0, le=2048)] = 0
    """Pictures that each evaluation draws for KID, of the captions of as many held-out images, which they are compared
    with; no more than are held out. 0: no KID, and the CLIP score of the sample pictures alone, which costs next to
    nothing."""


MEASURED_IMAGES = 16
"""Held-out images that an evaluation measures where `validation.maxImages` is left out."""


class Validation(ApiModel):
    """Loss on the held-out split, with the same noise each time, sample pictures, and scores of pictures."""

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 250
    """Optimizer steps between two evaluations."""
    max_images: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Most held-out images whose loss is measured, the first by content hash, and most training images beside them,
    each at 8 noise levels. Default 16, so that evaluations cost about 2 % of a fine-tuning's time; more smooth the
    curve."""
    prompts: Annotated[tuple[SamplePrompt, ...], Field(max_length=32)] = ()
    """Pictures of the sample grid."""
    early_stopping: EarlyStopping | None = None
    """Stop when the validation loss no longer falls; left out, the run takes all its steps."""
    scores: Scores | None = None
    """CLIP score and KID at each evaluation; left out, there are none."""

    @property
    def measured_images(self) -> int:
        """Most held-out images that an evaluation measures."""
        return self.max_images or MEASURED_IMAGES

    @property
    def draws(self) -> bool:
        """Whether evaluations draw pictures."""
        return bool(self.prompts) or self.scores is not None


class Checkpoint(ApiModel):
    """Resumable state in the output destination."""

    interval: Annotated[str, Field(max_length=16, pattern=r"^(Auto|[1-9][0-9]*(steps|s|m|h))$")] = "Auto"
    """Auto, a number of optimizer steps (`500steps`) or a time (`90s`, `10m`, `2h`). Auto weighs the cost of saving
    against the work that a preemption would lose."""
    keep_last: Annotated[int, Field(ge=2, le=100)] = 2
    """Checkpoints kept. At least 2, so that a damaged one can be stepped over."""
    resume: Literal["Auto", "Never"] = "Auto"
    """Auto: a new attempt continues from the newest valid checkpoint. Never: each attempt starts over."""


class Tracking(ApiModel):
    """Where curves go, besides the job's status and the Prometheus metrics."""

    tensorboard: bool = True
    """Write TensorBoard event files to the output destination."""
