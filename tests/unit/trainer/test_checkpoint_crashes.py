"""Kill the process before and after every single call to the store, and look at what the next attempt finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from diffusion_trainer.checkpoint import Ledger, Retention, Snapshot
from testkit.objectstore import Crash, CrashAt, MemoryStore, Objects, TappedStore, When

DAY = 24 * 3600.0


@dataclass
class World:
    """The bucket, and what the job was told."""

    objects: Objects = field(default_factory=Objects)
    acknowledged: list[int] = field(default_factory=list)

    def attempt(self, number: int, steps: list[int], tap: CrashAt) -> None:
        """Run one attempt: resume, and publish each step that is still ahead."""
        ledger = Ledger(
            TappedStore(MemoryStore(self.objects), tap),
            attempt=number,
            run_spec_sha="spec",
            retention=Retention(keep_last=1),
            clock=lambda: self.objects.now,
        )
        ledger.acquire()
        found = ledger.load()
        at = found.step if found else 0
        for step in steps:
            if step > at:
                ledger.publish(Snapshot(step, {}, {"data": "x" * step}), best=("loss", 1.0) if step == 1 else None)
                self.acknowledged.append(step)

    def recovered(self, number: int) -> int | None:
        """Return the step that a new attempt resumes from, having checked that its content is whole."""
        ledger = Ledger(MemoryStore(self.objects), attempt=number, run_spec_sha="spec")
        head = ledger.acquire()
        snapshot = ledger.load()
        assert not any(entry.bad for entry in head.history)
        if snapshot is None:
            assert head.newest is None
            return None
        assert head.newest is not None  # I2: the newest entry itself is valid, nothing was skipped
        assert head.newest.step == snapshot.step
        assert snapshot.scalars == {"data": "x" * snapshot.step}
        return snapshot.step


def story(world: World, tap: CrashAt) -> None:
    """Acquire, load, publish, collect; then a second attempt, with an orphan of the first in its way."""
    world.attempt(1, [1, 2, 3], tap)
    store = MemoryStore(world.objects)
    store.put("ckpt/0000000099-a0001/model.safetensors", b"left over by a crash of attempt 1")
    world.objects.now += 2 * DAY
    world.attempt(2, [1, 2, 3, 4, 5], tap)


def calls_of(run: Callable[[World, CrashAt], None]) -> int:
    counter = CrashAt(None)
    run(World(), counter)
    return counter.calls


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_call_loses_nothing_acknowledged(when: When) -> None:
    total = calls_of(story)
    assert total > 30
    for call in range(total):
        world = World()
        with pytest.raises(Crash):
            story(world, CrashAt(call, when))
        newest = world.recovered(8)
        # I1 and I3: what was acknowledged is there; one commit may have happened without its acknowledgement.
        last = max(world.acknowledged, default=0)
        assert (newest or 0) in {last, last + 1}, call
        world.attempt(9, [1, 2, 3, 4, 5], CrashAt(None))
        assert world.recovered(10) == 5


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_call_leaves_no_garbage_for_ever(when: When) -> None:
    for call in range(calls_of(story)):
        world = World()
        with pytest.raises(Crash):
            story(world, CrashAt(call, when))
        world.objects.now += 2 * DAY
        world.attempt(9, [6], CrashAt(None))
        head = Ledger(MemoryStore(world.objects), attempt=10, run_spec_sha="spec").acquire()
        listed = {entry.key for entry in head.history}
        kept = {info.key.rpartition("/")[0] for info in MemoryStore(world.objects).list("ckpt/")}
        assert kept == listed, call
        assert head.newest is not None
        assert head.newest.step == 6


def test_the_same_attempt_started_again_after_a_crash_goes_on() -> None:
    def twice(world: World, tap: CrashAt) -> None:
        world.attempt(1, [1, 2], tap)

    for call in range(calls_of(twice)):
        world = World()
        with pytest.raises(Crash):
            twice(world, CrashAt(call))
        world.attempt(1, [1, 2], CrashAt(None))
        assert world.recovered(2) == 2


def test_nothing_is_deleted_before_the_new_checkpoint_is_committed() -> None:
    world = World()
    order: list[str] = []

    def tap(operation: str, key: str, when: When) -> None:
        if when == "after":
            order.append(f"{operation} {key}")

    ledger = Ledger(
        TappedStore(MemoryStore(world.objects), tap), attempt=1, run_spec_sha="", retention=Retention(keep_last=1)
    )
    ledger.acquire()
    ledger.publish(Snapshot(1, {}, {}))
    order.clear()
    ledger.publish(Snapshot(2, {}, {}))
    assert order == [
        "put_file ckpt/0000000002-a0001/state.json",
        "head ckpt/0000000002-a0001/state.json",
        "put ckpt/0000000002-a0001/MANIFEST.json",
        "put HEAD.json",
        "list ckpt/",
        "delete ckpt/0000000001-a0001/MANIFEST.json",
        "delete ckpt/0000000001-a0001/state.json",
    ]
