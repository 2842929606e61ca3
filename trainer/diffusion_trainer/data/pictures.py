"""The files of a dataset on this machine, by content hash."""

from __future__ import annotations

from pathlib import Path

from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.objectstore import ObjectStore


class Pictures:
    """Downloads on demand into a content-addressed folder, and trusts nothing that it has not hashed."""

    def __init__(self, source: ObjectStore, work: Path) -> None:
        """`source` is the dataset's root; files land below `work`/images."""
        self.source = source
        self.folder = work / "images"

    def path(self, image: LockedImage) -> Path:
        """Return the local file of a locked image. Raises `BadData` when it changed or vanished since the freeze."""
        raise NotImplementedError

    def fetch(self, lock: DatasetLock) -> None:
        """Download all images of the lock that are not here yet. Raises `BadData` like `path`."""
        raise NotImplementedError
