"""The folders that a run's images come from: one, or one for each concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_api.job import TrainerSpec
from diffusion_trainer.objectstore import ObjectStore


@dataclass(frozen=True, slots=True)
class Folder:
    """Images of one subject. `field` is the field of the job that names the folder, for messages.

    `default` is the caption of images that have none, `caption` that of all images, whatever stands beside them;
    neither has the prefix. `weight` says how often an image is drawn, relative to other folders'.
    """

    store: ObjectStore
    field: str = "dataset.source"
    default: str | None = None
    caption: str | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return f"{self.field} {self.store.uri}"


def folders_of(spec: TrainerSpec, stores: Sequence[ObjectStore]) -> tuple[Folder, ...]:
    """Return the folders of a run in the order of the spec; `stores` are theirs, opened.

    `LockedImage.concept` counts them.
    """
    dataset = spec.dataset
    caption = spec.dream_booth.instance_prompt if spec.dream_booth else None
    if spec.method == "Unconditional":
        caption = ""  # there is no text
    if dataset.concepts is None:
        return (Folder(stores[0], default=dataset.captions.default, caption=caption),)
    return tuple(
        Folder(
            store,
            field=f"dataset.concepts[{number}].source",
            default=concept.prompt if concept.prompt is not None else dataset.captions.default,
            caption=caption,
            weight=concept.weight,
        )
        for number, (concept, store) in enumerate(zip(dataset.concepts, stores, strict=True))
    )
