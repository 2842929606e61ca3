"""A bounded look at a dataset: what can be known within seconds, by the very rules that freezing applies later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeAlias, TypeVar

from diffusion_api.dataset import Dataset
from diffusion_trainer.data.folders import Folder
from diffusion_trainer.data.freezing import (
    Checked,
    check,
    demand_captions,
    demand_few_bad,
    demand_some_left,
)
from diffusion_trainer.data.layouts import (
    IMAGE_SUFFIXES,
    METADATA,
    OTHER_IMAGE_SUFFIXES,
    Candidate,
    candidates,
    hidden,
    sidecars,
)
from diffusion_trainer.data.pictures import PARALLEL, Pictures
from diffusion_trainer.objectstore import ObjectInfo, ObjectStore
from diffusion_trainer.objectstore.parallel import in_parallel

LISTED = 50_000
"""Objects that are listed: 50 requests on S3, a few seconds."""
SAMPLE = 8
"""Images that are downloaded and decoded, of all folders together, but at least one of each."""

Objects: TypeAlias = Mapping[str, ObjectInfo]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Survey:
    """What was seen. Where not `complete`, the dataset has more images than were counted."""

    images: int
    complete: bool
    size_bytes: int
    sampled: int
    warnings: tuple[str, ...] = ()


def survey(
    dataset: Dataset, folders: Sequence[Folder], *, work: Path, listed: int = LISTED, sample: int = SAMPLE
) -> Survey:
    """List the folders, check that captions are there, and decode images from all over them.

    What would make freezing fail for certain is raised; what may is a warning.

    Raises:
        BadData, InputMissing: as `freeze` would.

    """
    each = max(1, sample // len(folders))
    pictures = Pictures([folder.store for folder in folders], work)
    seen = [
        _survey(dataset, folder, partial(check, dataset=dataset, pictures=pictures, concept=number), listed, each)
        for number, folder in enumerate(folders)
    ]
    return Survey(
        images=sum(one.images for one in seen),
        complete=all(one.complete for one in seen),
        size_bytes=sum(one.size_bytes for one in seen),
        sampled=sum(one.sampled for one in seen),
        warnings=tuple(text for one in seen for text in one.warnings),
    )


def _survey(dataset: Dataset, folder: Folder, look: Callable[[Candidate], Checked], listed: int, sample: int) -> Survey:
    found = list(islice(folder.store.list(), listed + 1))
    complete = len(found) <= listed
    objects = {info.key: info for info in found[:listed] if not hidden(info.key)}
    described = _described(dataset, folder, objects, last="" if complete else found[listed - 1].key, sample=sample)
    chosen = [one for one in _spread(described, sample) if not one.fault]
    looked_at = in_parallel(look, chosen, parallel=PARALLEL)
    by_key = {one.candidate.key: one for one in looked_at}
    known = [by_key.get(one.key) or Checked(one, reason=one.fault, bad=bool(one.fault)) for one in described]
    _demand_usable(known, looked_at, dataset, folder, complete=complete)
    return Survey(
        images=len(described),
        complete=complete,
        size_bytes=sum(one.size_bytes for one in described),
        sampled=len(looked_at),
        warnings=_warnings(looked_at, folder, complete=complete, listed=listed),
    )


def _described(dataset: Dataset, folder: Folder, objects: Objects, *, last: str, sample: int) -> tuple[Candidate, ...]:
    """Return all listed images. `last` is the last listed key of a folder with more objects, "" when that is all."""
    source = folder.store
    images = [key for key in objects if key.lower().endswith(IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES)]
    tables = any(PurePosixPath(key).name == METADATA for key in objects)
    in_tables = dataset.format != "Sidecar" and (tables or dataset.format == "ImageFolder")
    if not images or (in_tables and not last):
        described = candidates(objects, source, dataset.format, field=folder.field)
        demand_captions(described, folder)
        return described
    if in_tables or (last and dataset.format != "Sidecar"):  # a table may come behind what was listed
        return tuple(Candidate(key, objects[key].size, "", fault=_fault(key)) for key in images)
    read = {one.key: one for one in _with_captions(_spread(images, sample), objects, source)}
    described = tuple(read.get(key) or _by_name(objects[key], objects, last=last) for key in images)
    demand_captions(described, folder)
    return described


def _with_captions(images: Sequence[str], objects: Objects, source: ObjectStore) -> tuple[Candidate, ...]:
    """Return the images with what stands in their caption files."""
    keys = [*images, *(key for image in images for key in sidecars(image))]
    return candidates({key: objects[key] for key in keys if key in objects}, source, "Sidecar")


def _by_name(info: ObjectInfo, objects: Objects, *, last: str) -> Candidate:
    """Return an image whose caption file was not read, only looked for."""
    files = sidecars(info.key)
    beyond = bool(last) and max(files) > last
    there = beyond or any(key in objects for key in files)
    return Candidate(info.key, info.size, "" if there else None, fault=_fault(info.key))


def _fault(key: str) -> str:
    return "no JPEG, PNG or WebP image" if key.lower().endswith(OTHER_IMAGE_SUFFIXES) else ""


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items from all over, in order."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _demand_usable(
    known: Sequence[Checked], looked_at: Sequence[Checked], dataset: Dataset, folder: Folder, *, complete: bool
) -> None:
    if complete:
        demand_few_bad(known, dataset.filters, folder)
    if looked_at and all(one.bad for one in looked_at):
        demand_few_bad(looked_at, dataset.filters, folder)
    if complete and len(looked_at) == len(known):
        demand_some_left(known, folder)


def _warnings(looked_at: Sequence[Checked], folder: Folder, *, complete: bool, listed: int) -> tuple[str, ...]:
    warnings = []
    if not complete:
        warnings.append(
            f"{folder.store.uri} has more than {listed} objects; the rest is looked at when training begins"
        )
    left_out = [one for one in looked_at if one.reason]
    if left_out:
        named = "; ".join(f"{one.candidate.key}: {one.reason}" for one in left_out[:3])
        warnings.append(f"{len(left_out)} of {len(looked_at)} sampled images would be left out ({named})")
    return tuple(warnings)
