"""The captions of an image: its own, or orders of its tags."""

from __future__ import annotations

from diffusion_api.dataset import Captions
from diffusion_trainer.data.lock import LockedImage
from diffusion_trainer.rng import Purpose, stream


class CaptionVariants:
    """The captions that go with the cached variants of an image: a function of (seed, image id, variant).

    Where tags are shuffled each variant has an order of its own, so that embeddings can be cached however long a run
    is. The prefix stays where it is.
    """

    def __init__(self, captions: Captions, *, variants: int, seed: int) -> None:
        """`variants` of them belong to each image that is trained on."""
        self._captions = captions
        self._variants = variants
        self._seed = seed

    def of(self, image: LockedImage) -> tuple[str, ...]:
        """Return the caption of each variant; a held-out or class image keeps its own."""
        if image.split == "validation":
            return (image.caption,)
        if not self._captions.shuffle_tags or image.role == "class":
            return (image.caption,) * self._variants
        return tuple(self._shuffled(image, number) for number in range(self._variants))

    def _shuffled(self, image: LockedImage, number: int) -> str:
        prefix = self._captions.prefix
        tags = [tag for part in image.caption.removeprefix(prefix).split(",") if (tag := part.strip())]
        order = stream(self._seed, Purpose.TAGS, image.id, number).permutation(len(tags))
        return prefix + ", ".join(tags[place] for place in order)
