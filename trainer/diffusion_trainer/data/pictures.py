"""The files of a dataset on this machine, by content hash."""

from __future__ import annotations

import hashlib
import threading
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

    def __init__(self, source: ObjectStore, work: Path) -> None:
        """`source` is the dataset's root; files land below `work`/images."""
        self.source = source
        self.folder = work / "images"

    def path(self, image: LockedImage) -> Path:
        """Return the local file of a locked image. Raises `BadData` when it changed or vanished since the freeze."""
        path = self.place(image.id)
        if path.exists():
            return path
        try:
            found = self.download(image.key)
        except NotFound as error:
            raise BadData(
                f"{self.source.uri}{image.key} was there when the dataset was frozen and is gone; {_REMEDY}"
            ) from error
        if found != image.id:
            raise BadData(
                f"{self.source.uri}{image.key} has changed since the dataset was frozen (its sha256 is {found[:12]}, "
                f"the lock has {image.id[:12]}); {_REMEDY}"
            )
        return path

    def fetch(self, lock: DatasetLock) -> None:
        """Download all images of the lock that are not here yet. Raises `BadData` like `path`."""
        in_parallel(self.path, lock.images, parallel=PARALLEL)

    def download(self, key: str) -> str:
        """Download an object and return its sha256, which `place` turns into its path. Raises `NotFound`."""
        arriving = self.folder / "arriving" / f"{hashlib.sha256(key.encode()).hexdigest()}-{threading.get_ident()}"
        arriving.parent.mkdir(parents=True, exist_ok=True)
        self.source.get_to_file(key, arriving)
        with arriving.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        path = self.place(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving.replace(path)
        return found

    def place(self, content: str) -> Path:
        """Return where the file with this sha256 lies once it is downloaded."""
        return self.folder / content[:2] / content
