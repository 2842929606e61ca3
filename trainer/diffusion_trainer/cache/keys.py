"""Names of what is cached: hashes of everything that decides the content, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict

from diffusion_trainer.data.lock import LockedImage
from diffusion_trainer.data.transforms import Variant

CODE_VERSION = 1
"""Raise it when decoding, the transform or the stored values change meaning: old shards are then not found any more."""
STORED_DTYPE = "bf16"


def latents_key(image: LockedImage, variant: Variant, *, vae_hash: str) -> str:
    """Return the name of the latents of one variant. Equal variants (no crop, no flip drawn) share one name."""
    return _hashed(
        {
            "kind": "latents",
            "code": CODE_VERSION,
            "dtype": STORED_DTYPE,
            "image": image.id,
            "bucket": image.bucket,
            "variant": asdict(variant),
            "vae": vae_hash,
        }
    )


def text_key(caption: str, *, text_hash: str) -> str:
    """Return the name of what a text encoder, or a tokenizer, makes of a caption."""
    return _hashed(
        {"kind": "text", "code": CODE_VERSION, "dtype": STORED_DTYPE, "caption": caption, "encoder": text_hash}
    )


def text_entries(caption: str, names: Iterable[str], *, text_hash: str) -> dict[str, str]:
    """Return the name of each part of a caption's conditioning; they begin alike, so that they lie together."""
    key = text_key(caption, text_hash=text_hash)
    return {name: f"{key}/{name}" for name in names}


def shard_key(entries: Iterable[str]) -> str:
    """Return the name of the shard that holds exactly these entries."""
    return _hashed(sorted(entries))


def _hashed(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
