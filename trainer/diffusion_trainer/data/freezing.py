"""From whatever a user put into a folder to a dataset lock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from PIL import Image

from diffusion_api.dataset import Dataset, Filters
from diffusion_trainer.data.buckets import choose, nearest
from diffusion_trainer.data.decoding import MAX_FILE_BYTES, Rejected, decode
from diffusion_trainer.data.folders import Folder
from diffusion_trainer.data.layouts import Candidate, read_layout
from diffusion_trainer.data.lock import DatasetLock, LockedImage, Shape, Split
from diffusion_trainer.data.pictures import PARALLEL, Pictures
from diffusion_trainer.data.sharpness import sharpness
from diffusion_trainer.errors import BadData
from diffusion_trainer.objectstore.parallel import in_parallel
from diffusion_trainer.rng import Purpose, stream

MAX_REJECTED_KEYS = 20
DUPLICATE = "duplicate"
_SHOWN = 5
_AT_A_TIME = 256


@dataclass(frozen=True, slots=True)
class Checked:
    """A candidate after its file was looked at. `bad`: it could not be read, as opposed to not being wanted."""

    candidate: Candidate
    id: str = ""
    size: Shape = (0, 0)
    reason: str = ""
    bad: bool = False
    concept: int = 0


def freeze(
    dataset: Dataset,
    folders: Sequence[Folder],
    *,
    seed: int,
    batch_size: int,
    work: Path,
    report: Callable[[str], None],
) -> DatasetLock:
    """Read a dataset completely and return what a run will train on.

    Lists the folders, downloads, decodes and checks each image, reads captions, applies filters, drops duplicates,
    quarantines what cannot be read, splits, and assigns buckets. `batch_size` is the global batch: shapes with too few
    images to fill half of one are merged into the nearest. `report` is told of progress in words. Files that it
    downloads stay below `work`, for `Pictures`.

    Raises:
        BadData: too many unreadable images, images without a caption, nothing left to train on.
        InputMissing: there are no images at the source, or the layout's file is missing.

    """
    pictures = Pictures([folder.store for folder in folders], work)
    checked: list[Checked] = []
    for concept, folder in enumerate(folders):
        candidates = read_layout(folder.store, dataset.format, field=folder.field)
        demand_captions(candidates, folder)
        found = [replace(one, concept=concept) for one in _checked(candidates, dataset, pictures, report, concept)]
        demand_few_bad(found, dataset.filters, folder)
        checked += found
    checked = _drop_duplicates(checked, dataset.filters)
    for concept, folder in enumerate(folders):
        demand_some_left([one for one in checked if one.concept == concept], folder)
    kept = [one for one in checked if not one.reason]
    splits = split(_members(kept), dataset.validation.fraction, seed=seed)
    shapes = choose([one.size for one in kept if splits[one.id] == "train"], dataset, batch_size=batch_size)
    images = tuple(
        LockedImage(
            id=one.id,
            key=one.candidate.key,
            width=one.size[0],
            height=one.size[1],
            caption=dataset.captions.prefix + _caption(one.candidate, folders[one.concept]),
            bucket=nearest(one.size, shapes),
            split=splits[one.id],
            concept=one.concept,
            weight=folders[one.concept].weight,
        )
        for one in kept
    )
    return DatasetLock(images, _rejected(checked, folders), counts(checked))


def _members(kept: Sequence[Checked]) -> list[list[str]]:
    """Return the contents of each concept; one that several have belongs to the first."""
    homes = {one.id: one.concept for one in reversed(kept)}
    return [[content for content, home in homes.items() if home == concept] for concept in sorted({*homes.values()})]


def split(members: Sequence[Sequence[str]], fraction: float, *, seed: int) -> dict[str, Split]:
    """Return the split of each content hash: those that a keyed draw ranks first in their concept are held out.

    Equal images are on one side because they have one hash. Each concept gives its share. Where anything is held out at
    all, it is at least one image, if need be of the largest concept, and each concept keeps one to train on.
    """
    shares = [round(fraction * len(contents)) for contents in members]
    if fraction and not any(shares):
        shares[max(range(len(members)), key=lambda i: len(members[i]))] = 1
    result: dict[str, Split] = {}
    for contents, share in zip(members, shares, strict=True):
        ranked = sorted(contents, key=lambda content: (stream(seed, Purpose.SPLIT, content).random(), content))
        held_out = min(share, len(ranked) - 1)
        result |= {content: "validation" if i < held_out else "train" for i, content in enumerate(ranked)}
    return result


def demand_captions(candidates: Sequence[Candidate], folder: Folder) -> None:
    """Raise `BadData` when an image has no caption and there is none for such images."""
    without = [one.key for one in candidates if one.caption is None and not one.fault]
    if without and folder.default is None and folder.caption is None:
        raise BadData(
            f"{folder.name}: {len(without)} of {len(candidates)} images have no caption: "
            f"{_some(without)}; add a line to metadata.jsonl or a .txt file beside each, or set "
            "dataset.captions.default" + (" or the concept's prompt" if "concepts" in folder.field else "")
        )


def _checked(
    candidates: Sequence[Candidate],
    dataset: Dataset,
    pictures: Pictures,
    report: Callable[[str], None],
    concept: int,
) -> list[Checked]:
    remaining = iter(candidates)
    checked: list[Checked] = []
    while some := list(islice(remaining, _AT_A_TIME)):
        checked += in_parallel(lambda one: check(one, dataset, pictures, concept=concept), some, parallel=PARALLEL)
        report(f"checking images {len(checked)}/{len(candidates)}")
    return checked


def check(candidate: Candidate, dataset: Dataset, pictures: Pictures, *, concept: int = 0) -> Checked:
    """Download and decode a candidate."""
    if candidate.fault:
        return Checked(candidate, reason=candidate.fault, bad=True)
    if candidate.size_bytes > MAX_FILE_BYTES:  # not even downloaded
        return Checked(candidate, reason=f"the file is larger than {MAX_FILE_BYTES // 1024**2} MiB", bad=True)
    content = pictures.download(candidate.key, concept=concept)
    try:
        picture = decode(pictures.place(content))
    except Rejected as rejected:
        return Checked(candidate, reason=rejected.reason, bad=True)
    return Checked(candidate, id=content, size=picture.size, reason=_unwanted(picture, dataset))


def _unwanted(picture: Image.Image, dataset: Dataset) -> str:
    filters, size = dataset.filters, picture.size
    if min(size) < filters.min_side:
        return f"a side below filters.minSide ({filters.min_side})"
    if max(size) / min(size) > filters.max_aspect_ratio:
        return f"aspect ratio above filters.maxAspectRatio ({filters.max_aspect_ratio:g})"
    if filters.min_sharpness is not None and sharpness(picture, side=dataset.resolution) < filters.min_sharpness:
        return f"sharpness below filters.minSharpness ({filters.min_sharpness:g})"
    return ""


def _drop_duplicates(checked: Sequence[Checked], filters: Filters) -> list[Checked]:
    """Keep the first image of each content in the order of the folders and keys."""
    if filters.duplicates == "Keep":
        return list(checked)
    seen: set[str] = set()
    result = []
    for one in checked:
        if not one.reason and one.id in seen:
            result.append(replace(one, reason=DUPLICATE))
        else:
            seen.add(one.id)
            result.append(one)
    return result


def demand_few_bad(checked: Sequence[Checked], filters: Filters, folder: Folder) -> None:
    """Raise `BadData` when more images cannot be read than `filters` allows."""
    bad = [one for one in checked if one.bad]
    if len(bad) <= filters.max_bad_fraction * len(checked):
        return
    named = _some([f"{one.candidate.key} ({one.reason})" for one in bad])
    raise BadData(
        f"{folder.name}: {len(bad)} of {len(checked)} images cannot be read, more than "
        f"filters.maxBadFraction ({filters.max_bad_fraction:g}) allows: {named}; mend or remove them, or raise it"
    )


def demand_some_left(checked: Sequence[Checked], folder: Folder) -> None:
    """Raise `BadData` when no image of a folder can be used."""
    if all(one.reason for one in checked):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in counts(checked).items())
        raise BadData(f"{folder.name}: no image is left to train on ({reasons}); relax dataset.filters")


def _caption(candidate: Candidate, folder: Folder) -> str:
    if folder.caption is not None:
        return folder.caption
    return candidate.caption if candidate.caption is not None else folder.default or ""


def counts(checked: Iterable[Checked]) -> dict[str, int]:
    """Return how many images are left out, by reason."""
    return dict(sorted(Counter(one.reason for one in checked if one.reason).items()))


def _rejected(checked: Iterable[Checked], folders: Sequence[Folder]) -> dict[str, tuple[str, ...]]:
    """Return keys by reason; where there are several folders, with the folder."""
    rejected: dict[str, tuple[str, ...]] = {}
    for one in checked:
        if one.reason:
            where = folders[one.concept].store.uri if len(folders) > 1 else ""
            keys = rejected.get(one.reason, ())
            rejected[one.reason] = (*keys, where + one.candidate.key)[:MAX_REJECTED_KEYS]
    return dict(sorted(rejected.items()))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
