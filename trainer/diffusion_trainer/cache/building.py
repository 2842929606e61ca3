"""Build what is missing of a cache, fetch the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import torch

from diffusion_trainer.cache.keys import latents_key, shard_key, text_entries
from diffusion_trainer.cache.reading import Cache
from diffusion_trainer.cache.shards import Shard, Shelf
from diffusion_trainer.data.captions import CaptionVariants
from diffusion_trainer.data.decoding import Rejected, decode
from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.data.pictures import Pictures
from diffusion_trainer.data.transforms import Geometry, Variant, Variants, geometry, transform
from diffusion_trainer.errors import BadData
from diffusion_trainer.methods import TextPath
from diffusion_trainer.models.base import Family
from diffusion_trainer.objectstore import ObjectStore
from diffusion_trainer.objectstore.parallel import in_parallel

_ENTRIES_PER_SHARD = 128  # of 512 px: 8 MiB of latents, 15 MiB of text; seconds of a GPU's work
_PIXELS_AT_A_TIME = 8 * 512 * 512  # 5 GB of activations in fp32
_PARALLEL = 8
_CAPTIONS_AT_A_TIME = 32

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The variant that one entry holds."""

    image: LockedImage
    variant: Variant


def build(  # noqa: PLR0913 - what a cache depends on, and which part of it
    lock: DatasetLock,
    family: Family,
    store: ObjectStore,
    *,
    variants: Variants,
    captions: CaptionVariants | None = None,
    pictures: Pictures,
    report: Callable[[str], None],
    part: slice = slice(None),
    text: TextPath | None = None,
) -> Cache:
    """Return the cache of a dataset: each shard from this machine, else from the bucket, else encoded and uploaded.

    `store` is the output destination; shards lie below `names.CACHE_PREFIX`, local copies beside the pictures. Images
    are downloaded (by `pictures`) only for shards that have to be encoded. Calling it again after an interruption
    repeats at most one shard. `part` of the shards are seen to, and the cache lacks the others: several processes each
    encode a part, and then fetch all. `text` says what is kept of captions; by default, what frozen encoders say.

    Raises:
        BadData: an image changed or vanished since the freeze, or the VAE makes no finite numbers of it.

    """
    shelf = Shelf(store, pictures.folder.parent / "cache")
    text, vae_hash = text or TextPath(family), family.vae_hash()
    wanted: dict[str, _Wanted] = {}
    latents: list[tuple[str, ...]] = []
    geometries: list[tuple[Geometry, ...]] = []
    for image in lock.images:
        drawn = variants.of(image)
        keys = tuple(latents_key(image, variant, vae_hash=vae_hash) for variant in drawn)
        wanted.update(zip(keys, (_Wanted(image, variant) for variant in drawn), strict=True))
        latents.append(keys)
        size = (image.width, image.height)
        geometries.append(tuple(geometry(size, variant, image.bucket) for variant in drawn))
    texts = {caption: text_entries(caption, text.names, text_hash=text.hash) for caption in _captions(lock, captions)}

    def encode_latents(shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
        return _latents({key: wanted[key] for key in shard.entries}, family, pictures)

    captions_of = {key: caption for caption, keys in texts.items() for key in keys.values()}

    def encode_text(shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
        return _text({captions_of[key]: texts[captions_of[key]] for key in shard.entries}, text.cached)

    images = {key: one.image.id for key, one in wanted.items()}  # variants of an image lie together
    places = _obtained(_shards("latents", images)[part], encode_latents, shelf, report)
    keys_of_texts = {key: key for keys in texts.values() for key in keys.values()}
    places |= _obtained(_shards("text", keys_of_texts)[part], encode_text, shelf, report)
    return Cache(latents, texts, places, geometry=geometries)


def _obtained(
    shards: Sequence[Shard],
    encode: Callable[[Shard], Iterator[tuple[str, torch.Tensor]]],
    shelf: Shelf,
    report: Callable[[str], None],
) -> dict[str, Path]:
    """See that shards are on this machine, and return the file of each entry. Each entry made is a sign of life."""
    total = sum(len(shard.entries) for shard in shards)
    places: dict[str, Path] = {}

    def make(shard: Shard) -> dict[str, torch.Tensor]:
        made = {}
        for key, entry in encode(shard):
            made[key] = entry
            report(f"encoding {shard.kind} {len(places) + len(made)}/{total}")
        return made

    for shard in shards:
        if not shelf.obtain(shard, partial(make, shard)):
            report(f"fetching {shard.kind} {len(places) + len(shard.entries)}/{total}")
        places.update(dict.fromkeys(shard.entries, shelf.path(shard)))
    return places


def _captions(lock: DatasetLock, captions: CaptionVariants | None) -> list[str]:
    """Return what is encoded: each caption once, and the empty one, which caption dropout and guidance need."""
    drawn = {caption for image in lock.images for caption in (captions.of(image) if captions else ())}
    return sorted({"", *(image.caption for image in lock.images), *drawn})


def _shards(kind: str, entries: Mapping[str, str]) -> list[Shard]:
    """Deal entries out by the hash that each is given with, so that a changed image touches two shards at most.

    Their number is a power of two; when it grows with the dataset, every shard gets a new name.
    """
    keys = sorted(entries, key=lambda key: (entries[key], key))
    bits = max(0, (len(keys) - 1) // _ENTRIES_PER_SHARD).bit_length()
    grouped = groupby(keys, key=lambda key: int(entries[key][:8], 16) >> (32 - bits))
    return [Shard(kind, shard_key(members), frozenset(members)) for members in (list(group) for _, group in grouped)]


def _latents(wanted: Mapping[str, _Wanted], family: Family, pictures: Pictures) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield [2, C, h, w] (mean, standard deviation) in bf16 of each entry; batches have one shape each."""
    ordered = sorted(wanted, key=lambda key: (wanted[key].image.bucket, wanted[key].image.id, key))
    for (width, height), group in groupby(ordered, key=lambda key: wanted[key].image.bucket):
        for keys in _some(group, max(1, _PIXELS_AT_A_TIME // (width * height))):
            pixels = torch.stack(_pixels([wanted[key] for key in keys], pictures))
            both = torch.stack(family.encode_images(pixels), dim=1)
            for key, entry in zip(keys, both, strict=True):
                if not torch.isfinite(entry).all():
                    raise BadData(
                        f"the VAE makes no finite numbers of {wanted[key].image.key}; remove that image, or use "
                        "another model.source"
                    )
                yield key, entry.to(torch.bfloat16)


def _pixels(wanted: Sequence[_Wanted], pictures: Pictures) -> list[torch.Tensor]:
    """Return the pixels of each; images are decoded side by side, and once for all their variants."""
    by_image = [list(group) for _, group in groupby(wanted, key=lambda one: one.image.id)]

    def pixels(variants: Sequence[_Wanted]) -> list[torch.Tensor]:
        image = variants[0].image
        try:
            picture = decode(pictures.path(image))
        except Rejected as rejected:  # it was decoded once already
            raise BadData(f"{image.key} cannot be decoded any more: {rejected.reason}; start a new job") from rejected
        return [transform(picture, one.variant, image.bucket)[0] for one in variants]

    return [one for some in in_parallel(pixels, by_image, parallel=_PARALLEL) for one in some]


def _text(
    texts: Mapping[str, Mapping[str, str]], encode: Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each entry of captions: embeddings in bf16, tokens as they are."""
    for captions in _some(sorted(texts, key=lambda caption: sorted(texts[caption].values())), _CAPTIONS_AT_A_TIME):
        for name, rows in encode(captions).items():
            stored = rows.to(torch.bfloat16) if rows.is_floating_point() else rows
            yield from zip((texts[caption][name] for caption in captions), stored, strict=True)


def _some(items: Iterable[T], count: int) -> Iterator[Sequence[T]]:
    remaining = iter(items)
    while some := list(islice(remaining, count)):
        yield some
