"""From whatever a user put into a folder to a dataset lock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from diffusion_api.dataset import Dataset, Filters
from diffusion_trainer.data.buckets import choose, nearest
from diffusion_trainer.data.decoding import MAX_FILE_BYTES, Rejected, decode
from diffusion_trainer.data.layouts import Candidate, read_layout
from diffusion_trainer.data.lock import DatasetLock, LockedImage, Shape, Split
from diffusion_trainer.data.pictures import PARALLEL, Pictures
from diffusion_trainer.errors import BadData
from diffusion_trainer.objectstore import ObjectStore
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


def freeze(
    dataset: Dataset, source: ObjectStore, *, seed: int, batch_size: int, work: Path, report: Callable[[str], None]
) -> DatasetLock:
    """Read a dataset completely and return what a run will train on.

    Lists `source`, downloads, decodes and checks each image, reads captions, applies filters, drops duplicates,
    quarantines what cannot be read, splits, and assigns buckets. `batch_size` is the global batch: shapes with too few
    images to fill half of one are merged into the nearest. `report` is told of progress in words. Files that it
    downloads stay below `work`, for `Pictures`.

    Raises:
        BadData: too many unreadable images, images without a caption, nothing left to train on.
        InputMissing: there are no images at the source, or the layout's file is missing.

    """
    candidates = read_layout(source, dataset.format)
    demand_captions(candidates, dataset, source)
    checked = _drop_duplicates(_checked(candidates, dataset.filters, Pictures(source, work), report), dataset.filters)
    demand_few_bad(checked, dataset.filters, source)
    kept = [one for one in checked if not one.reason]
    if not kept:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in counts(checked).items())
        raise BadData(f"dataset.source {source.uri}: no image is left to train on ({reasons}); relax dataset.filters")
    splits = split({one.id for one in kept}, dataset.validation.fraction, seed=seed)
    shapes = choose([one.size for one in kept if splits[one.id] == "train"], dataset, batch_size=batch_size)
    images = tuple(
        LockedImage(
            id=one.id,
            key=one.candidate.key,
            width=one.size[0],
            height=one.size[1],
            caption=_caption(one.candidate, dataset),
            bucket=nearest(one.size, shapes),
            split=splits[one.id],
        )
        for one in kept
    )
    return DatasetLock(images, _rejected(checked), counts(checked))


def split(contents: Iterable[str], fraction: float, *, seed: int) -> dict[str, Split]:
    """Return the split of each content hash: those that a keyed draw ranks first are held out.

    Equal images are on one side because they have one hash. Where anything is held out at all, it is at least one
    image, and at least one is left to train on.
    """
    ranked = sorted(contents, key=lambda content: (stream(seed, Purpose.SPLIT, content).random(), content))
    wanted = max(1, round(fraction * len(ranked))) if fraction else 0
    held_out = min(wanted, len(ranked) - 1)
    return {content: "validation" if i < held_out else "train" for i, content in enumerate(ranked)}


def demand_captions(candidates: Sequence[Candidate], dataset: Dataset, source: ObjectStore) -> None:
    """Raise `BadData` when an image has no caption and there is none for such images."""
    without = [one.key for one in candidates if one.caption is None and not one.fault]
    if without and dataset.captions.default is None:
        raise BadData(
            f"dataset.source {source.uri}: {len(without)} of {len(candidates)} images have no caption: "
            f"{_some(without)}; add a line to metadata.jsonl or a .txt file beside each, or set "
            "dataset.captions.default"
        )


def _checked(
    candidates: Sequence[Candidate], filters: Filters, pictures: Pictures, report: Callable[[str], None]
) -> list[Checked]:
    remaining = iter(candidates)
    checked: list[Checked] = []
    while some := list(islice(remaining, _AT_A_TIME)):
        checked += in_parallel(lambda one: check(one, filters, pictures), some, parallel=PARALLEL)
        report(f"checking images {len(checked)}/{len(candidates)}")
    return checked


def check(candidate: Candidate, filters: Filters, pictures: Pictures) -> Checked:
    """Download and decode a candidate."""
    if candidate.fault:
        return Checked(candidate, reason=candidate.fault, bad=True)
    if candidate.size_bytes > MAX_FILE_BYTES:  # not even downloaded
        return Checked(candidate, reason=f"the file is larger than {MAX_FILE_BYTES // 1024**2} MiB", bad=True)
    content = pictures.download(candidate.key)
    try:
        size = decode(pictures.place(content)).size
    except Rejected as rejected:
        return Checked(candidate, reason=rejected.reason, bad=True)
    return Checked(candidate, id=content, size=size, reason=_unwanted(size, filters))


def _unwanted(size: Shape, filters: Filters) -> str:
    if min(size) < filters.min_side:
        return f"a side below filters.minSide ({filters.min_side})"
    if max(size) / min(size) > filters.max_aspect_ratio:
        return f"aspect ratio above filters.maxAspectRatio ({filters.max_aspect_ratio:g})"
    return ""


def _drop_duplicates(checked: Sequence[Checked], filters: Filters) -> list[Checked]:
    """Keep the first image of each content in the order of the keys."""
    if filters.duplicates == "Keep":
        return list(checked)
    seen: set[str] = set()
    result = []
    for one in checked:
        if not one.reason and one.id in seen:
            result.append(Checked(one.candidate, reason=DUPLICATE))
        else:
            seen.add(one.id)
            result.append(one)
    return result


def demand_few_bad(checked: Sequence[Checked], filters: Filters, source: ObjectStore) -> None:
    """Raise `BadData` when more images cannot be read than `filters` allows."""
    bad = [one for one in checked if one.bad]
    if len(bad) <= filters.max_bad_fraction * len(checked):
        return
    named = _some([f"{one.candidate.key} ({one.reason})" for one in bad])
    raise BadData(
        f"dataset.source {source.uri}: {len(bad)} of {len(checked)} images cannot be read, more than "
        f"filters.maxBadFraction ({filters.max_bad_fraction:g}) allows: {named}; mend or remove them, or raise it"
    )


def _caption(candidate: Candidate, dataset: Dataset) -> str:
    own = candidate.caption if candidate.caption is not None else dataset.captions.default or ""
    return dataset.captions.prefix + own


def counts(checked: Iterable[Checked]) -> dict[str, int]:
    """Return how many images are left out, by reason."""
    return dict(sorted(Counter(one.reason for one in checked if one.reason).items()))


def _rejected(checked: Iterable[Checked]) -> dict[str, tuple[str, ...]]:
    rejected: dict[str, tuple[str, ...]] = {}
    for one in checked:
        if one.reason:
            keys = rejected.get(one.reason, ())
            rejected[one.reason] = (*keys, one.candidate.key)[:MAX_REJECTED_KEYS]
    return dict(sorted(rejected.items()))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
