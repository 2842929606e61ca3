"""`spec.dataset`: where the images are and what is done to them before training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from diffusion_api.meta import ApiModel, Cel, Uri, cel


class Concept(ApiModel):
    """One subject of several (EveryDream style)."""

    source: Uri
    """Folder of this concept's images."""
    prompt: Annotated[str, Field(max_length=1024)] | None = None
    """Caption of images that have none of their own; without it captions.default."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often an image of this concept is drawn, relative to the others. In each epoch the images of the concept with
    the lowest weight are used once, those of another one weight / lowest weight times; of a fraction, another part of
    the images each time is used once more."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    """Probability of training an image of this concept with the empty caption; left out, captions.dropout."""


class Buckets(ApiModel):
    """Aspect-ratio buckets: images keep their shape, batches share one."""

    enabled: bool = True
    """Off: everything is cropped to a square."""
    step: Annotated[int, Field(ge=8, le=256, multiple_of=8)] = 64
    """Granularity of bucket sides, in pixels."""
    max_shapes: Annotated[int, Field(ge=1, le=32)] = 15
    """Most shapes in use; images of rarer shapes go to the nearest one, none is dropped."""


class Augmentation(ApiModel):
    """Random changes, the same for the same image, epoch and seed."""

    horizontal_flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of mirroring. Use 0 for faces, text and anything with a left and a right."""
    crop: Literal["Center", "Random"] = "Center"
    """Which part of an image that does not fit its bucket is used."""
    rotate_degrees: Annotated[float, Field(ge=0, le=45)] = 0
    """Largest rotation to either side. The image is scaled up as far as it takes to have no empty corners."""
    color_jitter: Annotated[float, Field(ge=0, le=1)] = 0
    """Strength of random brightness, contrast and saturation: each is multiplied by a factor between 1 - colorJitter
    and 1 + colorJitter."""
    variants_per_image: Annotated[int, Field(ge=1, le=16)] = 2
    """Cached variants of each image; each epoch uses one."""


class Captions(ApiModel):
    """Captions and what is done to them."""

    generate: Literal["Never", "Missing", "Always"] = "Never"
    """Write captions with a captioning model for no image, those without, or all."""
    model: Uri | None = None
    """The captioning model."""
    default: Annotated[str, Field(max_length=1024)] | None = None
    """Caption of images that have none. Without it, an image without a caption is an error."""
    prefix: Annotated[str, Field(max_length=256)] = ""
    """Put before every caption."""
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Probability of training with the empty caption, which classifier-free guidance needs. A concept's captionDropout
    comes before it."""
    shuffle_tags: bool = False
    """Shuffle comma-separated tags. Each cached variant of an image has an order of its own, so there are
    augmentation.variantsPerImage of them; the prefix stays in front."""


class Filters(ApiModel):
    """Images that are left out, counted by reason in the job's report."""

    min_side: Annotated[int, Field(ge=1, le=8192)] = 256
    """Shortest side in pixels."""
    max_aspect_ratio: Annotated[float, Field(ge=1, le=32)] = 3
    """Longest side divided by shortest."""
    duplicates: Literal["Drop", "Keep"] = "Drop"
    """What happens to images with the same content."""
    min_sharpness: Annotated[float, Field(ge=0)] | None = None
    """Least variance of the Laplacian of the grey image (0 to 255) at the size it is trained at. Blurred photographs
    are often below 100; look at your own before choosing."""
    safety: Literal["Keep", "Drop"] = "Keep"
    """What happens to images that a safety classifier flags."""
    min_caption_match: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least CLIP similarity of image and caption."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of unreadable images above which the job fails instead of going on without them."""


class HeldOut(ApiModel):
    """The held-out split."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of images, chosen by their content, that is never trained on."""


class Dataset(ApiModel):
    """Images and captions."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Cel(
                "has(self.source) != has(self.concepts)",
                "set exactly one of dataset.source and dataset.concepts",
            )
        )
    )

    source: Uri | None = None
    """Folder with the images. Exactly one of source and concepts."""
    concepts: Annotated[tuple[Concept, ...], Field(min_length=1, max_length=100)] | None = None
    """Several subjects, each with its own folder. Exactly one of source and concepts."""
    format: Literal["Auto", "ImageFolder", "Sidecar", "Kohya", "WebDataset", "Parquet", "HuggingFace"] = "Auto"
    """Layout of the folder. Auto: metadata.jsonl makes it ImageFolder, text files beside the images Sidecar."""
    resolution: Annotated[int, Field(ge=64, le=2048, multiple_of=8)] = 512
    """Side, in pixels, of the square whose area an image is scaled to."""
    buckets: Buckets = Field(default_factory=Buckets)
    """Aspect-ratio buckets."""
    augmentation: Augmentation = Field(default_factory=Augmentation)
    """Random changes to images."""
    captions: Captions = Field(default_factory=Captions)
    """Captions."""
    filters: Filters = Field(default_factory=Filters)
    """Images that are left out."""
    validation: HeldOut = Field(default_factory=HeldOut)
    """The held-out split."""

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if (self.source is None) == (self.concepts is None):
            raise ValueError("set exactly one of dataset.source and dataset.concepts")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Folders with images: the one, or those of the concepts in their order."""
        return (self.source,) if self.source is not None else tuple(one.source for one in self.concepts or ())

    @property
    def caption_dropouts(self) -> tuple[float, ...]:
        """Probabilities of the empty caption, in the order of `sources`."""
        given = [one.caption_dropout for one in self.concepts] if self.concepts is not None else [None]
        return tuple(self.captions.dropout if own is None else own for own in given)
