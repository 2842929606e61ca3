"""Crops, flips, turns, colours: from an image to the pixels of its bucket, and what a family may be told about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageEnhance

from diffusion_api.dataset import Augmentation
from diffusion_trainer.data.lock import LockedImage, Shape
from diffusion_trainer.rng import Purpose, stream

_AS_IT_IS = (1.0, 1.0, 1.0)
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True, slots=True)
class Variant:
    """One crop and flip of one image: scaled to `scaled`, then cut to the bucket at (left, top), then mirrored.

    Shapes are (width, height) and everything is in pixels after scaling. Before it is cut, it is turned about the
    middle of what is cut out, by `degrees` against the clock. `colours` are the factors of brightness, contrast and
    saturation.
    """

    scaled: Shape
    left: int
    top: int
    flip: bool
    degrees: float = 0.0
    colours: tuple[float, float, float] = _AS_IT_IS


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
        flip, x, y, turn, *colours = (float(value) for value in numbers.random(7))
        wanted = self._augmentation
        place = (x, y) if wanted.crop == "Random" else (0.5, 0.5)
        plain = _placed(image, scaled, place, flip=flip < wanted.horizontal_flip)
        if wanted.rotate_degrees:
            plain = _turned(plain, image.bucket, place, degrees=(2 * turn - 1) * wanted.rotate_degrees)
        if wanted.color_jitter:
            brightness, contrast, saturation = (1 + (2 * number - 1) * wanted.color_jitter for number in colours)
            plain = replace(plain, colours=(brightness, contrast, saturation))
        return plain


def cover(image: LockedImage) -> Shape:
    """Return the smallest size with the image's shape that covers its bucket."""
    width, height = image.bucket
    scale = max(width / image.width, height / image.height)
    return max(width, round(image.width * scale)), max(height, round(image.height * scale))


def transform(picture: Image.Image, variant: Variant, target: Shape) -> tuple[torch.Tensor, Geometry]:
    """Return the pixels, fp32 [3, height, width] in [-1, 1], and the geometry of exactly them.

    One resampling: Lanczos with a support that grows with the scale, so that it averages areas when it scales down. A
    turn is a second one, bicubic.
    """
    seen = _cut(picture, variant, target)
    if variant.colours != _AS_IT_IS:
        for enhancer, factor in zip(_ENHANCERS, variant.colours, strict=True):
            seen = enhancer(seen).enhance(factor)
    if variant.flip:
        seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(seen, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    return pixels, geometry(picture.size, variant, target)


def _cut(picture: Image.Image, variant: Variant, target: Shape) -> Image.Image:
    width, height = _room(target, variant.degrees)  # what has to be looked at
    beside, above = (width - target[0]) // 2, (height - target[1]) // 2
    left, top = variant.left - beside, variant.top - above
    x, y = picture.width / variant.scaled[0], picture.height / variant.scaled[1]
    box = (left * x, top * y, min((left + width) * x, picture.width), min((top + height) * y, picture.height))
    seen = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if not variant.degrees:
        return seen
    turned = seen.rotate(variant.degrees, Image.Resampling.BICUBIC)
    return turned.crop((beside, above, beside + target[0], above + target[1]))


def _room(target: Shape, degrees: float) -> Shape:
    """Return the upright rectangle around the turned target, with its middle, and a pixel more for interpolation."""
    if not degrees:
        return target
    sine, cosine = abs(math.sin(math.radians(degrees))), math.cos(math.radians(degrees))
    width, height = target
    beside = math.ceil((width * cosine + height * sine - width) / 2) + 1
    above = math.ceil((width * sine + height * cosine - height) / 2) + 1
    return width + 2 * max(0, beside), height + 2 * max(0, above)


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


def _turned(plain: Variant, target: Shape, place: tuple[float, float], *, degrees: float) -> Variant:
    """Return the variant turned: scaled up as far as it takes for the turned target to lie within the image."""
    room = _room(target, degrees)
    zoom = max(1.0, room[0] / plain.scaled[0], room[1] / plain.scaled[1])
    scaled = math.ceil(plain.scaled[0] * zoom), math.ceil(plain.scaled[1] * zoom)
    left = round((scaled[0] - room[0]) * place[0]) + (room[0] - target[0]) // 2
    top = round((scaled[1] - room[1]) * place[1]) + (room[1] - target[1]) // 2
    return replace(plain, scaled=scaled, left=left, top=top, degrees=degrees)
