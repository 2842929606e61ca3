"""Garbage collection: what no entry refers to any more, and nobody can still be writing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffusion_trainer.checkpoint.head import FOLDER, Head, Lease
from diffusion_trainer.objectstore import ObjectStore

_NAME = re.compile(re.escape(FOLDER) + r"(?P<step>\d{10,})-a(?P<attempt>\d{4,})(?:r(?P<start>\d+))?")


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder below ckpt/ that HEAD.json does not list; `modified` is the newest change in it, in store time."""

    folder: str
    keys: tuple[str, ...]
    modified: float


def collect(store: ObjectStore, *, before: Head, after: Head, orphans_before: float) -> None:
    """Delete what a commit (`before` to `after`) dropped, own failed uploads, and orphans of older attempts.

    Orphans are deleted when nothing in them changed since `orphans_before` (seconds since 1970).

    To be called by the holder of the fence, after its commit. Safe also when it has just lost the fence: its successor
    starts from `after` or something later, which refers to nothing that is deleted here. Raises StorageError.
    """
    dropped = {entry.key for entry in before.history} - {entry.key for entry in after.history}
    for left in _leftovers(store, after):
        if left.folder in dropped or _is_garbage(left, after.lease, orphans_before):
            for key in left.keys:
                store.delete(key)


def _leftovers(store: ObjectStore, head: Head) -> list[Leftover]:
    listed = {entry.key for entry in head.history}
    found: dict[str, Leftover] = {}
    for info in store.list(FOLDER):
        folder = "/".join(info.key.split("/")[:2])
        if folder not in listed:
            so_far = found.get(folder, Leftover(folder, (), 0.0))
            found[folder] = Leftover(folder, (*so_far.keys, info.key), max(so_far.modified, info.modified))
    return list(found.values())


def _is_garbage(left: Leftover, lease: Lease, oldest: float) -> bool:
    match = _NAME.fullmatch(left.folder)
    if match is None:
        return False  # not ours
    attempt, start = int(match["attempt"]), int(match["start"] or 0)
    if (attempt, start) == (lease.attempt, lease.start):
        return True  # one save is in flight at a time, and it has just been committed: this one failed
    return attempt < lease.attempt and left.modified < oldest
