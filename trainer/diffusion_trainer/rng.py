"""Stateless randomness: every random number is a function of (seed, purpose, indices), none of what was drawn before.

So a resumed run needs no generator state, and neither the number of processes, nor that of loader workers, nor the
micro-batch changes a single draw. Counter-based generator: Philox (Salmon et al. 2011), keyed with all 128 bits,
because torch's CPU generator uses only 32 bits of its seed and would repeat itself after some 65,000 keys.
"""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b

import numpy as np


class Purpose(StrEnum):
    """What a stream of random numbers is for. Two purposes never share a stream."""

    ORDER = "order"
    BATCH_ORDER = "batch-order"
    SPLIT = "split"
    AUGMENTATION = "augmentation"
    POSTERIOR = "posterior"
    NOISE = "noise"
    NOISE_OFFSET = "noise-offset"
    TIMESTEP = "timestep"
    CAPTION_DROPOUT = "caption-dropout"
    TAGS = "tags"
    REPEATS = "repeats"
    CLASS_IMAGE = "class-image"
    CLASS_ORDER = "class-order"
    ADAPTER_DROPOUT = "adapter-dropout"
    INITIALISATION = "initialisation"
    VALIDATION = "validation"
    TRAIN_SUBSET = "train-subset"
    SAMPLE = "sample"
    SCORE = "score"


def stream(seed: int, purpose: Purpose, *indices: int | str) -> np.random.Generator:
    """Return the generator of one draw, e.g. `stream(42, Purpose.NOISE, step, slot)`.

    The indices name the thing that the numbers belong to: an epoch, an optimizer step, a slot of the batch, an image's
    content hash. Equal arguments give equal numbers; anything else independent ones.
    """
    name = "\x1f".join(["diffusion-operator/1", str(seed), purpose, *(f"{type(i).__name__}:{i}" for i in indices)])
    key = np.frombuffer(blake2b(name.encode(), digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
