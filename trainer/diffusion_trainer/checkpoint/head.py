"""HEAD.json: who may publish, and what was published. Pure values and their JSON; no store is touched here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffusion_trainer.errors import CheckpointCorrupt, CheckpointUnsupported

HEAD_KEY = "HEAD.json"
MANIFEST_NAME = "MANIFEST.json"
FOLDER = "ckpt/"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to publish: the attempt that holds the fence, and which start of it (0 unless it was started again).

    Picklable: the supervisor acquires, and hands it to the process that uploads.
    """

    attempt: int
    start: int

    def folder(self, step: int) -> str:
        """Return the folder of a checkpoint, which no other start of the job ever writes to (no slash at its end)."""
        again = f"r{self.start}" if self.start else ""
        return f"{FOLDER}{step:010d}-a{self.attempt:04d}{again}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One acknowledged checkpoint: `key` is its folder, `time` the commit in seconds since 1970.

    `bad` is set when it was found damaged; it stays listed until enough good ones follow.
    """

    step: int
    attempt: int
    key: str
    manifest_sha256: str
    time: float
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Best:
    """The checkpoint to keep whatever happens to the others, and the metric that chose it."""

    step: int
    key: str
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class Head:
    """The content of HEAD.json. `history` is in the order of the commits, newest last."""

    fence: int
    start: int
    run_spec_sha: str
    history: tuple[Entry, ...] = ()
    best: Best | None = None

    @property
    def lease(self) -> Lease:
        """Return who holds the fence."""
        return Lease(self.fence, self.start)

    @property
    def newest(self) -> Entry | None:
        """Return the newest entry that is not known to be damaged: the point to resume from."""
        return next((entry for entry in reversed(self.history) if not entry.bad), None)

    def taken_by(self, attempt: int) -> Head:
        """Return the head after `attempt` took the fence; a start of the same attempt counts up."""
        return replace(self, fence=attempt, start=self.start + 1 if attempt == self.fence else 0)

    def committed(self, entry: Entry, *, keep_last: int, best: Best | None) -> Head:
        """Return the head after a commit: the last `keep_last` good entries, damaged ones among them, and the best.

        Idempotent: an entry that is listed already is not listed twice. A damaged one gives way to what was written to
        its folder again, after the run went back beyond it.
        """
        pinned = best or self.best
        history = tuple(known for known in self.history if not (known.bad and known.key == entry.key))
        known_already = any(known.key == entry.key for known in history)
        kept: list[Entry] = []
        good = 0
        for known in reversed(history if known_already else (*history, entry)):
            if good < keep_last or (pinned is not None and known.key == pinned.key):
                kept.append(known)
            good += not known.bad
        return replace(self, history=tuple(reversed(kept)), best=pinned)

    def marked_bad(self, key: str) -> Head:
        """Return the head with the entry at `key` marked as damaged; it is no longer the best one then."""
        history = tuple(replace(e, bad=True) if e.key == key else e for e in self.history)
        return replace(self, history=history, best=None if self.best and self.best.key == key else self.best)

    def encode(self) -> bytes:
        """Return the JSON of HEAD.json."""
        return (json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n").encode()


def decode_head(data: bytes, *, where: str) -> Head:
    """Return the head in the bytes of HEAD.json.

    Raises:
        CheckpointCorrupt: the bytes are not a HEAD.json.
        CheckpointUnsupported: a newer release wrote it.

    """
    try:
        raw: dict[str, Any] = json.loads(data)
        version = raw.pop("version")
        if version == VERSION:
            history = tuple(Entry(**entry) for entry in raw.pop("history"))
            best = raw.pop("best")
            return Head(**raw, history=history, best=None if best is None else Best(**best))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointCorrupt(
            f"read {where}: it is not a HEAD.json ({error}); restore an older version of this object from the bucket's "
            "versions, or move it away to start again from step 0"
        ) from error
    raise CheckpointUnsupported(
        f"read {where}: version {version!r} was written by another release (this one knows {VERSION}); "
        "use the trainer image that wrote it, or a newer one"
    )
