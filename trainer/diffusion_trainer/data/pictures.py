"""The files of a dataset on this machine, by content hash."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.errors import BadData, NotFound
from diffusion_trainer.objectstore import ObjectStore
from diffusion_trainer.objectstore.parallel import in_parallel

PARALLEL = 8
_REMEDY = "restore it, or start a new job, which freezes the dataset as it is now"


class Pictures:
    """Downloads on demand into a content-addressed folder, and trusts nothing that it has not hashed.

    Safe to use from several threads of one process.
    """

    def __init__(self, sources: Sequence[ObjectStore], work: Path) -> None:
        """`sources` are the folders that `LockedImage.concept` counts; files land below `work`/images."""
        self.sources = tuple(sources)
        self.folder = work / "images"

    def path(self, image: LockedImage) -> Path:
        """Return the local file of a locked image. Raises `BadData` when it changed or vanished since the freeze."""
        path = self.place(image.id)
        if path.exists():
            return path
        where = f"{self.sources[image.concept].uri}{image.key}"
        try:
            found = self.download(image.key, concept=image.concept)
        except NotFound as error:
            raise BadData(f"{where} was there when the dataset was frozen and is gone; {_REMEDY}") from error
        if found != image.id:
            raise BadData(
                f"{where} has changed since the dataset was frozen (its sha256 is "
                f"{found[:12]}, the lock has {image.id[:12]}); {_REMEDY}"
            )
        return path

    def fetch(self, lock: DatasetLock) -> None:
        """Download all images of the lock that are not here yet. Raises `BadData` like `path`."""
        in_parallel(self.path, lock.images, parallel=PARALLEL)

    def download(self, key: str, *, concept: int = 0) -> str:
        """Download an object and return its sha256, which `place` turns into its path. Raises `NotFound`."""
        arriving = (
            self.folder / "arriving" / f"{concept}-{hashlib.sha256(key.encode()).hexdigest()}-{threading.get_ident()}"
        )
        arriving.parent.mkdir(parents=True, exist_ok=True)
        self.sources[concept].get_to_file(key, arriving)
        with arriving.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        path = self.place(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving.replace(path)
        return found

    def place(self, content: str) -> Path:
        """Return where the file with this sha256 lies once it is downloaded."""
        return self.folder / content[:2] / content
