"""DiffusionTrainingJob: what a user writes, section by section, and what the operator answers (`status.py`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from diffusion_api import combinations, names
from diffusion_api.dataset import Dataset
from diffusion_api.meta import ApiModel, Cel, cel
from diffusion_api.method import MEMBERS, PRIOR_MESSAGE, DreamBooth, FineTune, LoRA, Method, TextualInversion
from diffusion_api.model import Family, Model
from diffusion_api.output import Credentials, Output
from diffusion_api.resources import Notification, PodOverrides, Resources, RunPolicy
from diffusion_api.training import DEFAULTS, OPTIMIZER_DEFAULTS, WHOLE_DREAMBOOTH_LEARNING_RATE, Training
from diffusion_api.unread import unread, unread_rules
from diffusion_api.validation import Checkpoint, Tracking, Validation

_IMMUTABLE = ("method", "model", "dataset", "training", "validation", "output", "resources")
_IMMUTABLE_OPTIONAL = ("lora", "dreamBooth", "fineTune", "textualInversion")
_HOW_TO_CHANGE = "cannot be changed: it decides the result. Delete the job, or create another one under a new name"
_ODD_BATCH = (
    "training.batchSize is odd, but half of each batch are class images: use an even number, or "
    "dreamBooth.priorLossWeight: 0"
)
_NOTHING_HELD_OUT = (
    "validation.earlyStopping goes by held-out images, but dataset.validation.fraction is 0: use 0.05, or leave "
    "earlyStopping out"
)
_ONE_IMAGE = "validation.scores.images is 1, and KID compares sets of at least 2: use 64, or 0 for no KID"
_NOTHING_TO_COMPARE = (
    "validation.scores.images compares with held-out images, but dataset.validation.fraction is 0: use 0.05, or no "
    "scores.images"
)
_NOTHING_TO_SCORE = "validation.scores: there are no pictures to score: add validation.prompts, or set images"
_NO_WORDS = (
    "validation.scores: method Unconditional draws without words, so that there is no CLIP score: set images, or leave "
    "scores out"
)


def _spec_rules() -> list[Cel]:
    rules = [
        Cel(
            "!has(self.lora) || self.method in ['LoRA', 'DreamBooth']",
            '"lora does not belong to method " + self.method + ": remove it, or set method: LoRA"',
            expression=True,
            field=".lora",
        ),
        Cel(
            "(self.method == 'DreamBooth') == has(self.dreamBooth)",
            '"method " + self.method + (has(self.dreamBooth) ? \' does not read dreamBooth: remove it, or set method: '
            "DreamBooth' : ' needs dreamBooth.instancePrompt')",
            expression=True,
        ),
        Cel(
            "!has(self.fineTune) || self.method == 'FineTune'",
            '"fineTune does not belong to method " + self.method + ": remove it, or set method: FineTune"',
            expression=True,
            field=".fineTune",
        ),
        Cel(
            "(self.method == 'TextualInversion') == has(self.textualInversion)",
            '"method " + self.method + (has(self.textualInversion) ? \' does not read textualInversion: remove it, or '
            "set method: TextualInversion' : ' needs textualInversion.token and initializerToken')",
            expression=True,
        ),
        Cel(
            "!has(self.lora) || !has(self.dreamBooth) || !has(self.dreamBooth.adapter) || self.dreamBooth.adapter != "
            "'None'",
            "lora: dreamBooth.adapter is None, so there is no adapter: remove lora, or use adapter: LoRA",
            field=".lora",
        ),
        Cel(
            "!has(self.dreamBooth) || self.dreamBooth.priorLossWeight == 0.0 || !has(self.training.batchSize) || "
            "self.training.batchSize % 2 == 0",
            _ODD_BATCH,
            field=".training.batchSize",
        ),
        Cel(
            "!has(self.validation.earlyStopping) || self.dataset.validation.fraction > 0.0",
            _NOTHING_HELD_OUT,
            field=".dataset.validation.fraction",
        ),
        *_score_rules(),
        *combinations.fit_rules(),
        *combinations.format_rules(),
        *unread_rules(),
    ]
    rules.extend(
        Cel(f"self.{name} == oldSelf.{name}", f"{name} {_HOW_TO_CHANGE}", field=f".{name}") for name in _IMMUTABLE
    )
    for name in _IMMUTABLE_OPTIONAL:
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"
        rules.append(Cel(same, f"{name} {_HOW_TO_CHANGE}", field=f".{name}"))
    rules.append(
        Cel(
            "self.managedBy == oldSelf.managedBy",
            "managedBy cannot be changed: the other controller does not know what this one has begun. Delete the job, "
            "or create another one under a new name",
            field=".managedBy",
        )
    )
    return rules


def _score_rules() -> list[Cel]:
    off, images = "!has(self.validation.scores) || ", "self.validation.scores.images"
    return [
        Cel(f"{off}{images} != 1", _ONE_IMAGE, field=".validation.scores.images"),
        Cel(
            f"{off}{images} == 0 || self.dataset.validation.fraction > 0.0",
            _NOTHING_TO_COMPARE,
            field=".dataset.validation.fraction",
        ),
        Cel(
            f"{off}{images} > 0 || self.method == 'Unconditional' || size(self.validation.prompts) > 0",
            _NOTHING_TO_SCORE,
            field=".validation.scores",
        ),
        Cel(f"{off}{images} > 0 || self.method != 'Unconditional'", _NO_WORDS, field=".validation.scores"),
    ]


class TrainerSpec(ApiModel):
    """The sections that the trainer reads, exactly as the user wrote them."""

    method: Method
    """What is trained. LoRA is the place to start."""
    lora: LoRA | None = None
    """Options of method LoRA, and of DreamBooth with an adapter."""
    dream_booth: DreamBooth | None = None
    """Options of method DreamBooth."""
    fine_tune: FineTune | None = None
    """Options of method FineTune."""
    textual_inversion: TextualInversion | None = None
    """Options of method TextualInversion."""
    model: Model
    """The base model."""
    dataset: Dataset
    """Images and captions."""
    training: Training = Field(default_factory=Training)
    """How it is trained."""
    validation: Validation = Field(default_factory=Validation)
    """Validation loss, early stopping, sample pictures and their scores."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """Resumable state."""
    tracking: Tracking = Field(default_factory=Tracking)
    """Where curves go."""
    output: Output
    """Where results go."""
    credentials: Credentials = Field(default_factory=Credentials)
    """How the trainer gets at its storage."""

    @model_validator(mode="after")
    def _members_belong(self) -> TrainerSpec:
        if self.lora and self.method not in {"LoRA", "DreamBooth"}:
            raise ValueError(f"lora does not belong to method {self.method}: remove it, or set method: LoRA")
        for method in ("DreamBooth", "FineTune", "TextualInversion"):
            member = MEMBERS[method]
            given = self.member(method) is not None
            if given and self.method != method:
                raise ValueError(
                    f"{member} does not belong to method {self.method}: remove it, or set method: {method}"
                )
            if not given and self.method == method != "FineTune":
                raise ValueError(f"method {method} needs the section {member}")
        if self.lora and self.dream_booth and self.dream_booth.adapter == "None":
            raise ValueError(
                "lora: dreamBooth.adapter is None, so there is no adapter: remove lora, or use adapter: LoRA"
            )
        if self.model.family != "Auto":
            for path, _, reason in self.misfits(self.model.family):
                raise ValueError(reason if path == "method" else f"{path}: {reason}")
        for name, reason in combinations.unwritable(self.method, self.trains, self.output.formats):
            raise ValueError(f"output.formats: {name}: {reason}")
        for sentence in unread(self.method, self.model_dump(mode="json", by_alias=True)):
            raise ValueError(sentence)
        return self

    @model_validator(mode="after")
    def _prior_and_stopping_have_what_they_need(self) -> TrainerSpec:
        booth = self.dream_booth
        if booth and booth.preserves_prior:
            if not (booth.class_prompt and booth.class_images):
                raise ValueError(f"dreamBooth: {PRIOR_MESSAGE}")
            if self.batch_size % 2:
                raise ValueError(_ODD_BATCH)
        if self.validation.early_stopping and not self.dataset.validation.fraction:
            raise ValueError(_NOTHING_HELD_OUT)
        return self

    @model_validator(mode="after")
    def _scores_have_something_to_score(self) -> TrainerSpec:
        scores = self.validation.scores
        if scores is None:
            return self
        if scores.images == 1:
            raise ValueError(_ONE_IMAGE)
        if scores.images and not self.dataset.validation.fraction:
            raise ValueError(_NOTHING_TO_COMPARE)
        if not scores.images and self.method == "Unconditional":
            raise ValueError(_NO_WORDS)
        if not scores.images and not self.validation.prompts:
            raise ValueError(_NOTHING_TO_SCORE)
        return self

    def member(self, method: str) -> ApiModel | None:
        """Return the section of a method, None where the user left it out."""
        sections = {
            "LoRA": self.lora,
            "DreamBooth": self.dream_booth,
            "FineTune": self.fine_tune,
            "TextualInversion": self.textual_inversion,
        }
        return sections.get(method)

    @property
    def trains(self) -> combinations.Kind:
        """What is trained, and comes out."""
        if self.method == "TextualInversion":
            return "Embedding"
        whole = self.dream_booth.adapter == "None" if self.dream_booth else self.method != "LoRA"
        return "Weights" if whole else "Adapter"

    @property
    def begins_anywhere(self) -> bool:
        """Whether the denoiser's weights may be missing: random ones stand in for them."""
        return self.method in {"FromScratch", "Unconditional"}

    def misfits(self, family: Family) -> Iterator[tuple[str, object, str]]:
        """Yield (path, value, reason and remedy) of what the job asks for and a model of that family cannot do."""
        parts = self.fine_tune.parts if self.fine_tune else None
        return combinations.misfits(
            self.method, family, model=self.model, parts=parts, objective=self.training.objective
        )

    @property
    def batch_size(self) -> int:
        """Images per optimizer step, over all processes."""
        return self.training.batch_size or DEFAULTS[self.method].batch_size

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        usual = OPTIMIZER_DEFAULTS[self.training.optimizer.name]
        whole = self.method == "DreamBooth" and self.trains == "Weights"
        rate = WHOLE_DREAMBOOTH_LEARNING_RATE if whole else DEFAULTS[self.method].learning_rate
        methods = usual.learning_rate or usual.learning_rate_factor * rate
        return self.training.learning_rate or methods

    def total_steps(self, batches_per_epoch: int) -> int:
        """Return the number of optimizer steps of the whole run."""
        if self.training.epochs is not None:
            return self.training.epochs * batches_per_epoch
        return self.training.max_steps or DEFAULTS[self.method].max_steps

    def identity(self) -> str:
        """Return the sha256 of what decides the weights: a checkpoint of another identity is never resumed from.

        The micro-batch size is left out: it changes with the hardware and only the order of summation with it. So is
        what is unset: a later version's new fields do not keep its trainer from resuming this one's jobs.
        """
        included = {"method", "lora", "dream_booth", "fine_tune", "textual_inversion", "model", "dataset", "training"}
        content = self.model_dump(mode="json", by_alias=True, include=included, exclude_none=True)
        content["training"].pop("microBatchSize")
        if self.validation.early_stopping:  # then evaluations decide which weights are exported
            deciding = {"every_steps", "early_stopping", "max_images"}
            content["validation"] = self.validation.model_dump(mode="json", include=deciding, exclude_none=True)
        content["training"]["learningRate"] = self.learning_rate
        content["training"]["optimizer"] = self.training.optimizer.filled().model_dump(mode="json", by_alias=True)
        content["defaults"] = DEFAULTS[self.method].model_dump(mode="json")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class JobSpec(TrainerSpec):
    """What a user writes."""

    model_config = ConfigDict(json_schema_extra=cel(*_spec_rules()))

    suspend: bool = False
    """Stop the pods after a checkpoint and start none, until it is false again."""
    managed_by: Annotated[str, Field(max_length=253)] = names.MANAGER
    """The controller in charge; another value than the default makes this operator leave the job alone."""
    resources: Resources
    """What it runs on."""
    run_policy: RunPolicy = Field(default_factory=RunPolicy)
    """Bounds of the whole run."""
    pod_overrides: PodOverrides = Field(default_factory=PodOverrides)
    """The parts of a pod that a user may set."""
    notifications: Annotated[tuple[Notification, ...], Field(max_length=8)] = ()
    """Whom to tell."""

    def trainer_part(self) -> TrainerSpec:
        """Return the sections that the trainer reads."""
        return TrainerSpec.model_validate({name: getattr(self, name) for name in TrainerSpec.model_fields})


Phase = Literal[
    "Pending",
    "Queued",
    "Preflight",
    "Scheduling",
    "Preparing",
    "Running",
    "Interrupted",
    "Suspended",
    "Complete",
    "Failed",
]
