"""What the frozen encoders make of the dataset: latents and text embeddings, computed once and kept in the bucket.

Belongs here: keys, the shards' format, building, fetching, reading. Does not belong here: what is encoded (`data`) and
by what (`models`).

A shard is named by what it must contain, and checked against its own hash before it is used. So a cache is never
stale, a build goes on where it was interrupted, and attempts and sweeps share what they have in common.
"""

from diffusion_trainer.cache.building import build
from diffusion_trainer.cache.reading import Cache

__all__ = ["Cache", "build"]
