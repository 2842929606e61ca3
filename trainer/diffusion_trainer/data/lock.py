"""The dataset lock: exactly which images, captions, shapes and split a run trains on, frozen at its first attempt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from diffusion_trainer.errors import BadData

Shape: TypeAlias = tuple[int, int]
"""Width and height in pixels, in this order everywhere in this package."""
Split = Literal["train", "validation"]
Role = Literal["instance", "class"]

_VERSION = 1


@dataclass(frozen=True, slots=True)
class LockedImage:
    """One image of the run. `id` is the sha256 of the file; width and height are those after EXIF rotation.

    `concept` counts the folders of `data.folders`, class images (DreamBooth) being in one more; `weight` says how often
    it is drawn, relative to others.
    """

    id: str
    key: str
    width: int
    height: int
    caption: str
    bucket: Shape
    split: Split
    concept: int = 0
    weight: float = 1.0
    role: Role = "instance"


_NEUTRAL = {"concept": 0, "weight": 1.0, "role": "instance"}
"""What is not written down, so that a lock of one plain folder is the same bytes as it ever was."""


@dataclass(frozen=True)
class DatasetLock:
    """The images of a run, in the order of their folders and the byte order of their keys, and what was left out.

    `rejected` maps a reason to some of the keys that it hit (at most `MAX_REJECTED_KEYS`), `rejected_counts` to how
    many there were.
    """

    images: tuple[LockedImage, ...]
    rejected: Mapping[str, tuple[str, ...]]
    rejected_counts: Mapping[str, int]

    @cached_property
    def sha(self) -> str:
        """Return the sha256 of the canonical JSON: what the data of a run is, in one value."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def training(self) -> tuple[int, ...]:
        """Return the indices of the images that are trained on, class images among them."""
        return tuple(i for i, image in enumerate(self.images) if image.split == "train")

    @property
    def instances(self) -> tuple[int, ...]:
        """Return the indices of the training images that are no class images."""
        return tuple(i for i in self.training if self.images[i].role == "instance")

    @property
    def held_out(self) -> tuple[int, ...]:
        """Return the indices of the images of the validation split."""
        return tuple(i for i, image in enumerate(self.images) if image.split == "validation")

    def to_json(self) -> bytes:
        """Return the canonical JSON: equal locks give equal bytes."""
        content = {
            "version": _VERSION,
            "images": [_written(image) for image in self.images],
            "rejected": {reason: list(keys) for reason, keys in self.rejected.items()},
            "rejectedCounts": dict(self.rejected_counts),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> DatasetLock:
        """Return the lock that `to_json` wrote. Raises `BadData` when it is not one."""
        try:
            content = json.loads(data)
            if content["version"] != _VERSION:
                raise BadData(
                    f"dataset lock: its version is {content['version']}, this trainer reads {_VERSION}; resume with "
                    "the trainer image that began the run, or start over under a new job name"
                )
            images = tuple(
                LockedImage(**{**fields, "bucket": (int(fields["bucket"][0]), int(fields["bucket"][1]))})
                for fields in content["images"]
            )
            rejected = {reason: tuple(keys) for reason, keys in content["rejected"].items()}
            return cls(images, rejected, dict(content["rejectedCounts"]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BadData(f"dataset lock: it cannot be read ({error}); delete it to freeze the dataset anew") from error


def _written(image: LockedImage) -> dict[str, object]:
    return {key: value for key, value in asdict(image).items() if key not in _NEUTRAL or value != _NEUTRAL[key]}
