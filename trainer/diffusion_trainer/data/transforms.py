"""Crops and flips: from a decoded image to the pixels of its bucket, and what a family may be told about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from diffusion_api.dataset import Augmentation
from diffusion_trainer.data.lock import LockedImage, Shape
from diffusion_trainer.rng import Purpose, stream


@dataclass(frozen=True, slots=True)
class Variant:
    """One crop and flip of one image: scaled to `scaled`, then cut to the bucket at (left, top), then mirrored.

    Shapes are (width, height) and everything is in pixels after scaling.
    """

    scaled: Shape
    left: int
    top: int
    flip: bool


@dataclass(frozen=True, slots=True)
class Geometry:
    """What SDXL is told about an image: sizes are (width, height); crop is (left, top) of the picture as it is seen."""

    original: Shape
    crop: Shape
    target: Shape

    def numbers(self) -> torch.Tensor:
        """Return fp32 [6]: original height and width, top and left, height and width (arXiv 2307.01952, 2.2)."""
        pairs = (self.original, self.crop, self.target)
        return torch.tensor([float(number) for pair in pairs for number in reversed(pair)])


class Variants:
    """The variants of each image: a function of (seed, image id, number of the variant)."""

    def __init__(self, augmentation: Augmentation, *, seed: int) -> None:
        self._augmentation = augmentation
        self._seed = seed

    def of(self, image: LockedImage) -> tuple[Variant, ...]:
        """Return the variants that are cached, `variantsPerImage` of them; of a held-out image only the plain one."""
        scaled = cover(image)
        if image.split == "validation":
            return (_placed(image, scaled, (0.5, 0.5), flip=False),)
        return tuple(self._drawn(image, scaled, k) for k in range(self._augmentation.variants_per_image))

    def _drawn(self, image: LockedImage, scaled: Shape, number: int) -> Variant:
        numbers = stream(self._seed, Purpose.AUGMENTATION, image.id, number)
        flip, x, y = (float(value) for value in numbers.random(3))
        place = (x, y) if self._augmentation.crop == "Random" else (0.5, 0.5)
        return _placed(image, scaled, place, flip=flip < self._augmentation.horizontal_flip)


def cover(image: LockedImage) -> Shape:
    """Return the smallest size with the image's shape that covers its bucket."""
    width, height = image.bucket
    scale = max(width / image.width, height / image.height)
    return max(width, round(image.width * scale)), max(height, round(image.height * scale))


def transform(picture: Image.Image, variant: Variant, target: Shape) -> tuple[torch.Tensor, Geometry]:
    """Return the pixels, fp32 [3, height, width] in [-1, 1], and the geometry of exactly them.

    One resampling: Lanczos with a support that grows with the scale, so that it averages areas when it scales down.
    """
    width, height = target
    x, y = picture.width / variant.scaled[0], picture.height / variant.scaled[1]
    box = (
        variant.left * x,
        variant.top * y,
        min((variant.left + width) * x, picture.width),
        min((variant.top + height) * y, picture.height),
    )
    seen = picture.resize(target, Image.Resampling.LANCZOS, box=box)
    if variant.flip:
        seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(seen, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    return pixels, geometry(picture.size, variant, target)


def geometry(original: Shape, variant: Variant, target: Shape) -> Geometry:
    """Return the geometry of one variant of an image of the size `original`."""
    left = variant.left
    if variant.flip:
        left = variant.scaled[0] - target[0] - variant.left  # what is cut off at the left was at the right
    return Geometry(original=original, crop=(left, variant.top), target=target)


def _placed(image: LockedImage, scaled: Shape, place: tuple[float, float], *, flip: bool) -> Variant:
    left = round((scaled[0] - image.bucket[0]) * place[0])
    top = round((scaled[1] - image.bucket[1]) * place[1])
    return Variant(scaled=scaled, left=left, top=top, flip=flip)
