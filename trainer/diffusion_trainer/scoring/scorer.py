"""Which pictures are drawn for scores, and what comes of them."""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_api.job import TrainerSpec
from diffusion_trainer.curves import Scored
from diffusion_trainer.data import DatasetLock, LockedImage, Pictures, Variants
from diffusion_trainer.data.decoding import Rejected, decode
from diffusion_trainer.data.transforms import transform
from diffusion_trainer.errors import BadConfig, BadData
from diffusion_trainer.models.sources import Source
from diffusion_trainer.scoring.clip import Clip
from diffusion_trainer.scoring.files import check_library, fetch_clip
from diffusion_trainer.scoring.measures import clip_score, kid

LOG = logging.getLogger(__name__)
_AT_A_TIME = 32
"""Pictures between two changes of place of the CLIP model: of 1024 px, 100 MB."""

Draw: TypeAlias = Callable[[Sequence[LockedImage]], Sequence[Image.Image]]
"""Draws a picture of the caption of each image, all of one shape."""
Finding: TypeAlias = tuple[int, str, float | None]
"""What is said of a drawn picture, in JSON's types: number of its image, features (fp32 in base64), CLIP score."""


@dataclass
class Scorer:
    """Looks at drawn pictures, and at the held-out `images` that they are compared with, as `real` shows them.

    Pictures are looked at one by one, so that nothing depends on how many processes share them. A model that draws
    without words has no CLIP score.
    """

    clip: Clip
    images: Sequence[LockedImage]
    real: Callable[[LockedImage], Image.Image]
    device: torch.device
    report: Callable[[str], None]
    words: bool = True
    _known: list[Tensor] = field(default_factory=list)

    def look(self, draw: Draw, *, part: slice = slice(None)) -> list[Finding]:
        """Draw a picture of the caption of each image, or of a part of them, and return what is said of them."""
        found: list[Finding] = []
        for group in self._groups(part):
            pictures = draw([self.images[number] for number in group])
            with self.clip.on(self.device):
                for number, picture in zip(group, pictures, strict=True):
                    words = self.images[number].caption
                    features = base64.b64encode(self.clip.look_at(picture).numpy().tobytes()).decode()
                    found.append((number, features, self._score(picture, words)))
        return found

    def conclude(self, step: int, found: Sequence[Finding], shown: Sequence[tuple[Image.Image, str]]) -> Scored:
        """Return the scores after `step`: of the pictures that were found, and of those `shown` with their prompts."""
        ordered = sorted(found)
        with self.clip.on(self.device):
            scores = [self._score(picture, words) for picture, words in shown]
            real = self._real() if ordered else []
        scores += [score for *_, score in ordered]
        there = [score for score in scores if score is not None]
        drawn = [torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy()) for _, text, _ in ordered]
        return Scored(
            step,
            clip_score=math.fsum(there) / len(there) if there else None,
            kid=kid(torch.stack(real), torch.stack(drawn)) if ordered else None,
        )

    def _score(self, picture: Image.Image, words: str) -> float | None:
        return clip_score(self.clip, picture, words) if self.words and words.strip() else None

    def _real(self) -> list[Tensor]:
        """Return the features of the held-out images, which stay the same; the first call looks at them."""
        for image in self.images[len(self._known) :]:
            self._known.append(self.clip.look_at(self.real(image)))
            self.report(f"looking at held-out images {len(self._known)}/{len(self.images)}")
        return self._known

    def _groups(self, part: slice) -> Iterator[list[int]]:
        """Yield the numbers of images that are drawn together, of one shape each."""
        numbers = sorted(range(len(self.images))[part], key=lambda i: (self.images[i].bucket, i))
        for _, same in groupby(numbers, key=lambda i: self.images[i].bucket):
            group = list(same)
            for start in range(0, len(group), _AT_A_TIME):
                yield group[start : start + _AT_A_TIME]


def open_scorer(
    spec: TrainerSpec,
    lock: DatasetLock,
    pictures: Pictures,
    *,
    source: Source | None,
    device: torch.device,
    report: Callable[[str], None],
) -> Scorer | None:
    """Download and load what scores need; None where no CLIP model (`source`) is named.

    Raises:
        BadConfig: torchmetrics is missing, or too few images are held out.
        BadData, InputMissing: the model is none.

    """
    if source is None:
        return None
    check_library()
    images = compared(lock, spec)
    report("loading the CLIP model")
    clip = Clip.open(fetch_clip(source, pictures.folder.parent))
    return Scorer(clip, images, _as_trained(spec, pictures), device, report, words=spec.method != "Unconditional")


def compared(lock: DatasetLock, spec: TrainerSpec) -> tuple[LockedImage, ...]:
    """Return the held-out images that pictures are drawn for, by content hash: `validation.scores.images` at most.

    Raises `BadConfig` where fewer than two are there, and some are wanted.
    """
    wanted = spec.validation.scores.images if spec.validation.scores else 0
    there = sorted((lock.images[i] for i in lock.held_out), key=lambda image: (image.id, image.key))
    if wanted and len(there) < 2:
        raise BadConfig(
            f"validation.scores.images is {wanted}, but {len(there)} of {len(lock.images)} images are held out, and "
            "KID compares sets of at least 2; raise dataset.validation.fraction, or use images: 0"
        )
    if len(there) < wanted:
        LOG.info("KID compares %d pictures, not %d: no more images are held out", len(there), wanted)
    return tuple(there[:wanted])


def _as_trained(spec: TrainerSpec, pictures: Pictures) -> Callable[[LockedImage], Image.Image]:
    """Return what shows an image as an evaluation of the loss sees it: scaled and cut to its bucket."""
    variants = Variants(spec.dataset.augmentation, seed=spec.training.seed)

    def show(image: LockedImage) -> Image.Image:
        try:
            picture = decode(pictures.path(image))
        except Rejected as rejected:  # it was decoded once already
            raise BadData(f"{image.key} cannot be decoded any more: {rejected.reason}; start a new job") from rejected
        pixels, _ = transform(picture, variants.of(image)[0], image.bucket)
        return Image.fromarray(((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())

    return show
