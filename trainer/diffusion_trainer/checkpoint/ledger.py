"""The ledger of a job's checkpoints: the fence, commits, and reading back. One process uses one ledger, one thread."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffusion_trainer.checkpoint.collect import collect
from diffusion_trainer.checkpoint.head import HEAD_KEY, MANIFEST_NAME, Best, Entry, Head, Lease, decode_head
from diffusion_trainer.checkpoint.manifest import File, Manifest, sha256_of, versions
from diffusion_trainer.checkpoint.reading import read_entry
from diffusion_trainer.checkpoint.snapshot import Snapshot
from diffusion_trainer.checkpoint.staging import Staging
from diffusion_trainer.errors import (
    CheckpointCorrupt,
    CheckpointUnsupported,
    Conflict,
    Fenced,
    NotFound,
    PreconditionFailed,
    SpecChanged,
    StorageError,
    StorageUnavailable,
)
from diffusion_trainer.objectstore import ObjectStore

_TRIES = 100  # each lost race means that another start of this job made progress; more than this is no race


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept: the last checkpoints, the best one, and for how long leftovers of older attempts."""

    keep_last: int = 2
    orphan_seconds: float = 24 * 3600.0

    def __post_init__(self) -> None:
        """Raise ValueError unless there is always something to fall back to."""
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keepLast is {self.keep_last}; keep at least 1 (2, to have a fall-back)")


class Ledger:
    """Checkpoints of one job below the root of `store` (a prefix that belongs to the job alone).

    `run_spec_sha` identifies what must not change between attempts. `clock` gives seconds since 1970. `on_warning` is
    told of damaged checkpoints and of garbage that could not be deleted; the ledger goes on.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        attempt: int,
        run_spec_sha: str,
        retention: Retention | None = None,
        clock: Callable[[], float] = time.time,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._run_spec_sha = run_spec_sha
        self._retention = retention or Retention()
        self._clock = clock
        self._warn = on_warning or (lambda _: None)
        self._lease: Lease | None = None
        self._held: tuple[Head, str] | None = None  # the last HEAD.json seen and its etag; None: read it again
        self._loaded: Entry | None = None

    def acquire(self) -> Head:
        """Take the fence for this attempt and return the HEAD to resume from.

        From here on every older attempt, and an older start of this one, fails with `Fenced` at its next commit.

        Raises:
            Fenced: a newer attempt holds it.
            SpecChanged: the checkpoints here belong to another `run_spec_sha` (the fence is not taken).
            CheckpointUnsupported: the store has no conditional writes, or a newer release wrote HEAD.json.
            StorageError: as the store raised it.

        """
        if not self._store.capabilities().compare_and_swap:
            raise CheckpointUnsupported(
                f"acquire {self._store.uri}: this store ignores conditional writes (If-None-Match, If-Match), without "
                "which two pods could overwrite each other's checkpoints; use a bucket on AWS S3, Ceph, versitygw or "
                "another store that has them, or a file:// volume"
            )
        for _ in range(_TRIES):
            found = self._read_head()
            taken = self._taken(found[0] if found else None)
            try:
                info = self._store.put(
                    HEAD_KEY, taken.encode(), if_absent=found is None, if_match=found[1] if found else None
                )
            except PreconditionFailed:
                continue
            self._lease, self._held = taken.lease, (taken, info.etag)
            return taken
        raise self._never_settled()

    def adopt(self, lease: Lease) -> None:
        """Publish under a fence that another process of this attempt acquired."""
        if lease.attempt != self._attempt:
            raise ValueError(f"the lease is of attempt {lease.attempt}, this ledger of attempt {self._attempt}")
        self._lease = lease

    def load(self, *, scratch: Path | None = None) -> Snapshot | None:
        """Return the newest checkpoint that verifies, None when none was ever published.

        Damaged ones are reported, marked in HEAD.json (by the holder of the fence), and skipped. `scratch` is a folder
        with room for one checkpoint.

        Raises:
            CheckpointCorrupt: there are entries, and not one of them is whole.
            StorageError: the store could not answer (that is never taken for damage or absence).
            Fenced: a newer attempt took over meanwhile.

        """
        found = self._held or self._read_head()
        if found is None or not found[0].history:
            return None
        for entry in reversed(found[0].history):
            if entry.bad:
                continue
            try:
                snapshot = self.read(entry, scratch=scratch)
            except CheckpointCorrupt as error:
                self._warn(str(error))
                if self._lease is not None:
                    self._update(partial(_mark_bad, key=entry.key))
                continue
            self._loaded = entry
            return snapshot
        raise CheckpointCorrupt(
            f"load {self._store.uri}: none of the {len(found[0].history)} published checkpoints is whole; restore "
            "their objects (bucket versions, backup), or start again under another name"
        )

    def start_over(self) -> Head:
        """Forget every checkpoint on purpose (`checkpoint.resume: Never`), so that step 0 may be trained again.

        The only way back to step 0. The objects stay until they are old enough to be swept as orphans.
        """
        return self._update(lambda head: replace(head, history=(), best=None))

    def read(self, entry: Entry, *, scratch: Path | None = None) -> Snapshot:
        """Return one checkpoint, for ranks that load what rank 0 loaded. Raises `CheckpointCorrupt`, StorageError."""
        return read_entry(self._store, entry, scratch=scratch)

    def look_again(self) -> None:
        """Forget the HEAD.json that was last seen: another process of this attempt may have published since."""
        self._held = None

    @property
    def loaded(self) -> Entry | None:
        """Return the entry that the last `load` returned."""
        return self._loaded

    @property
    def best(self) -> Best | None:
        """Return the checkpoint that is pinned, as of the HEAD.json that was last seen here."""
        return self._held[0].best if self._held else None

    def load_best(self, *, scratch: Path | None = None) -> Snapshot | None:
        """Return the pinned checkpoint, whoever published it; None when none is pinned.

        Raises `CheckpointCorrupt`, StorageError.
        """
        self._held = self._read_head()
        pinned = self.best
        if self._held is None or pinned is None:
            return None
        entry = next(entry for entry in self._held[0].history if entry.key == pinned.key)
        return self.read(entry, scratch=scratch)

    def publish(
        self, snapshot: Snapshot, *, best: tuple[str, float] | None = None, scratch: Path | None = None
    ) -> Entry:
        """Publish in this process; when it returns, the checkpoint is acknowledged. See `publish_files`."""
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=scratch) as folder:
            names = Staging(Path(folder)).stage(snapshot)
            return self.publish_files(snapshot.step, {name: Path(folder) / name for name in names}, best=best)

    def publish_files(self, step: int, files: Mapping[str, Path], *, best: tuple[str, float] | None = None) -> Entry:
        """Upload the files of a checkpoint (by their names in it) and commit; `best` (metric, value) pins it.

        A step that is the newest already is not published again. After `StorageUnavailable` the outcome is unknown,
        and publishing the same step again is safe.

        Raises:
            Fenced: a newer attempt, or another start of this one, took over.
            StorageError: as the store raised it.

        """
        before = self._current()
        if before.newest is not None and before.newest.step >= step:
            self._held = None  # the trainer may have found that one damaged meanwhile, and gone back beyond it
            before = self._current()
        newest = before.newest
        if newest is not None and newest.step > step:
            raise ValueError(f"publish step {step}: step {newest.step} is published already; steps only go forward")
        if newest is not None and newest.step == step:
            entry = newest
        else:
            entry = self._uploaded_or_fenced(step, files, parent=newest.key if newest else None)
        pinned = Best(step, entry.key, *best) if best else None
        after = self._update(lambda head: head.committed(entry, keep_last=self._retention.keep_last, best=pinned))
        try:
            oldest = self._clock() - self._retention.orphan_seconds
            collect(self._store, before=before, after=after, orphans_before=oldest)
        except StorageError as error:
            self._warn(f"old checkpoints could not be deleted, they take up room until the next commit: {error}")
        return entry

    def _uploaded_or_fenced(self, step: int, files: Mapping[str, Path], *, parent: str | None) -> Entry:
        try:
            return self._uploaded(step, files, parent=parent)
        except NotFound as error:
            # A process that hung for a day comes back to find its upload swept as an orphan by its successor.
            self._held = None
            self._current()
            raise StorageUnavailable(
                f"publish step {step} at {self._store.uri}: what was uploaded is gone ({error}); find out what else "
                "deletes below this prefix"
            ) from error

    def _uploaded(self, step: int, files: Mapping[str, Path], *, parent: str | None) -> Entry:
        """Upload everything of a checkpoint and verify that it is there, the manifest last."""
        folder = self._required_lease().folder(step)
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-sha256") as pool:
            # Hashing (no GIL) overlaps with the upload (network).
            hashes = {name: pool.submit(sha256_of, path) for name, path in files.items()}
            sizes = {name: self._store.put_file(f"{folder}/{name}", path).size for name, path in files.items()}
            listed = tuple(File(name, sizes[name], hashes[name].result()) for name in files)
        for file in listed:
            found = self._store.head(f"{folder}/{file.key}").size
            if found != file.size:
                raise StorageUnavailable(
                    f"publish {self._store.uri}{folder}/{file.key}: {found} of {file.size} bytes arrived; try again"
                )
        now = self._clock()
        manifest = Manifest(step, self._attempt, now, parent, listed, versions()).encode()
        self._put_manifest(f"{folder}/{MANIFEST_NAME}", manifest)
        return Entry(step, self._attempt, folder, hashlib.sha256(manifest).hexdigest(), now)

    def _put_manifest(self, key: str, manifest: bytes) -> None:
        try:
            self._store.put(key, manifest, if_absent=True)
        except PreconditionFailed:
            # No other start of the job writes to this folder: it is the remains of our own try that was not committed.
            _, found = self._store.get_with_info(key)
            self._store.put(key, manifest, if_match=found.etag)

    def _taken(self, head: Head | None) -> Head:
        if head is None:
            return Head(fence=self._attempt, start=0, run_spec_sha=self._run_spec_sha)
        if head.fence > self._attempt:
            raise self._fenced(head)
        if head.run_spec_sha != self._run_spec_sha:
            raise SpecChanged(
                f"acquire {self._store.uri}: the checkpoints here belong to the spec {head.run_spec_sha[:12]}, this "
                f"run has {self._run_spec_sha[:12]}; undo the change of the spec, or run it under another name"
            )
        return head.taken_by(self._attempt)

    def _update(self, change: Callable[[Head], Head]) -> Head:
        """Swap HEAD.json for what `change` makes of it, and return that. `change` must be idempotent."""
        for _ in range(_TRIES):
            head = self._current()
            changed = change(head)
            if changed == head:
                return head
            etag = self._required_etag()
            self._held = None  # until the outcome is known
            try:
                info = self._store.put(HEAD_KEY, changed.encode(), if_match=etag)
            except PreconditionFailed:
                continue
            self._held = (changed, info.etag)
            return changed
        raise self._never_settled()

    def _current(self) -> Head:
        """Return HEAD as last seen, or read it again where that is not known; raise `Fenced` when it is another's."""
        lease = self._required_lease()
        if self._held is None:
            self._held = self._read_head()
        if self._held is None:
            raise CheckpointCorrupt(
                f"publish {self._store.uri}{HEAD_KEY}: it was deleted under a running job; stop the job, restore the "
                "object from the bucket's versions, and start the job again"
            )
        head = self._held[0]
        if head.lease != lease:
            self._held = None
            raise self._fenced(head)
        return head

    def _read_head(self) -> tuple[Head, str] | None:
        try:
            data, info = self._store.get_with_info(HEAD_KEY)
        except NotFound:
            return None
        return decode_head(data, where=self._store.uri + HEAD_KEY), info.etag

    def _required_lease(self) -> Lease:
        if self._lease is None:
            raise RuntimeError("this ledger holds no fence; call acquire() or adopt() before it publishes")
        return self._lease

    def _required_etag(self) -> str:
        if self._held is None:
            raise RuntimeError("HEAD.json was not read")
        return self._held[1]

    def _fenced(self, head: Head) -> Fenced:
        return Fenced(
            f"attempt {self._attempt} at {self._store.uri}: attempt {head.fence} (start {head.start}) owns the "
            "checkpoints; this process is left over and must end, nothing is lost by it"
        )

    def _never_settled(self) -> Conflict:
        return Conflict(
            f"swap {self._store.uri}{HEAD_KEY}: {_TRIES} writes lost against others; find out what else writes it"
        )


def _mark_bad(head: Head, *, key: str) -> Head:
    return head.marked_bad(key)
