"""From whatever a user put into a folder to a dataset lock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusion_api.dataset import Dataset

from diffusion_trainer.data.lock import DatasetLock
from diffusion_trainer.objectstore import ObjectStore


def freeze(  # the files that it downloads stay below `work` for `Pictures`
    dataset: Dataset, source: ObjectStore, *, seed: int, batch_size: int, work: Path, report: Callable[[str], None]
) -> DatasetLock:
    """Read a dataset completely and return what a run will train on.

    Lists `source`, downloads, decodes and checks each image, reads captions, applies filters, drops duplicates,
    quarantines what cannot be read, splits, and assigns buckets. `batch_size` is the global batch: shapes with too few
    images to fill half of one are merged into the nearest. `report` is told of progress in words.

    Raises:
        BadData: too many unreadable images, images without a caption, nothing left to train on.
        InputMissing: there are no images at the source, or the layout's file is missing.

    """
    raise NotImplementedError
