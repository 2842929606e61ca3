"""Aspect-ratio buckets: a small table of shapes, and which image goes to which."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from diffusion_api.dataset import Dataset
from diffusion_trainer.data.lock import Shape


def table(dataset: Dataset) -> tuple[Shape, ...]:
    """Return every shape that a dataset may use, in order of aspect ratio; the square is always among them.

    Sides are multiples of `buckets.step`, areas at most that of the square, ratios at most `filters.maxAspectRatio`.
    Only the largest height for each width counts, and the other way round.
    """
    side, step = dataset.resolution, dataset.buckets.step
    if not dataset.buckets.enabled:
        return ((side, side),)
    shapes = {(side, side)}
    limit = max(1.0, dataset.filters.max_aspect_ratio)
    for long in range(-(-side // step) * step, int(side * math.sqrt(limit)) + step, step):
        short = side * side // long // step * step
        if short and long > short and long / short <= limit:
            shapes |= {(long, short), (short, long)}
    return tuple(sorted(_without_smaller(shapes), key=lambda shape: (shape[0] / shape[1], shape)))


def _without_smaller(shapes: set[Shape]) -> set[Shape]:
    """Drop shapes that another one covers: with a coarse step, 640x384 makes 576x384 pointless."""
    return {a for a in shapes if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in shapes)}


def choose(sizes: Sequence[Shape], dataset: Dataset, *, batch_size: int) -> tuple[Shape, ...]:
    """Return the shapes to use for training images of these sizes.

    The shape with the fewest images gives way, and its images move to the nearest shape left, as long as there are
    more than `buckets.maxShapes`, or it cannot fill half a batch: filling it up would repeat each of its images more
    than twice for every turn of another image.
    """
    shapes = table(dataset)
    members: dict[Shape, Counter[Shape]] = {}
    for size, count in Counter(sizes).items():
        members.setdefault(nearest(size, shapes), Counter())[size] += count
    while len(members) > 1:
        rarest = min(members, key=lambda shape: (members[shape].total(), -_distance(shape, (1, 1)), shape))
        if len(members) <= dataset.buckets.max_shapes and 2 * members[rarest].total() >= batch_size:
            break
        homeless = members.pop(rarest)
        for size, count in homeless.items():
            members[nearest(size, sorted(members))][size] += count
    return tuple(shape for shape in shapes if shape in members)


def nearest(size: Shape, shapes: Sequence[Shape]) -> Shape:
    """Return the shape whose aspect ratio is nearest to an image's, by the ratio of the ratios."""
    return min(shapes, key=lambda shape: (round(_distance(size, shape), 9), shape))


def _distance(a: Shape, b: Shape) -> float:
    return abs(math.log(a[0] / a[1]) - math.log(b[0] / b[1]))
