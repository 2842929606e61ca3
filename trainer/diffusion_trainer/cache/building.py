"""Build what is missing of a cache, fetch the rest."""

from __future__ import annotations

from collections.abc import Callable

from diffusion_trainer.cache.reading import Cache
from diffusion_trainer.data.lock import DatasetLock
from diffusion_trainer.data.pictures import Pictures
from diffusion_trainer.data.transforms import Variants
from diffusion_trainer.models.base import Family
from diffusion_trainer.objectstore import ObjectStore


def build(
    lock: DatasetLock,
    family: Family,
    store: ObjectStore,
    *,
    variants: Variants,
    pictures: Pictures,
    report: Callable[[str], None],
) -> Cache:
    """Return the cache of a dataset: each shard from this machine, else from the bucket, else encoded and uploaded.

    `store` is the output destination; shards lie below `names.CACHE_PREFIX`. Images are downloaded (by `pictures`)
    only for shards that have to be encoded. Calling it again after an interruption repeats at most one shard.
    """
    raise NotImplementedError
