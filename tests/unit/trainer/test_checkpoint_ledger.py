"""What the ledger answers when something is not as it should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffusion_trainer.checkpoint import Lease, Ledger, Retention, Snapshot
from diffusion_trainer.checkpoint.head import decode_head
from diffusion_trainer.errors import (
    CheckpointCorrupt,
    CheckpointUnsupported,
    Fenced,
    PermissionDenied,
    SpecChanged,
    StorageError,
    StorageUnavailable,
)
from testkit.objectstore import MemoryStore, Objects, TappedStore, When


def ledger_of(objects: Objects, attempt: int, *, warned: list[str] | None = None, **options: object) -> Ledger:
    told = [] if warned is None else warned
    chosen = {"run_spec_sha": "spec", "clock": lambda: objects.now} | options
    return Ledger(MemoryStore(objects), attempt=attempt, on_warning=told.append, **chosen)


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"model": {"w": torch.full((8,), float(step))}}, {"step": step})


@pytest.fixture
def objects() -> Objects:
    """Three checkpoints of attempt 1, of which two are kept."""
    objects = Objects()
    ledger = ledger_of(objects, 1)
    ledger.acquire()
    for step in (10, 20, 30):
        objects.now += 60
        ledger.publish(snapshot(step))
    return objects


def head_of(objects: Objects):
    return decode_head(objects.content["HEAD.json"][0], where="HEAD.json")


def test_nothing_published_is_none() -> None:
    assert ledger_of(Objects(), 1).load() is None
    empty = ledger_of(Objects(), 1)
    assert empty.acquire().history == ()
    assert empty.load() is None


def test_keys_and_entries_are_as_documented(objects: Objects) -> None:
    head = head_of(objects)
    assert [(e.step, e.attempt, e.key, e.time) for e in head.history] == [
        (20, 1, "ckpt/0000000020-a0001", 1_000_120.0),
        (30, 1, "ckpt/0000000030-a0001", 1_000_180.0),
    ]
    assert (head.fence, head.start, head.run_spec_sha) == (1, 0, "spec")
    assert sorted(key for key in objects.content if "30-" in key) == [
        "ckpt/0000000030-a0001/MANIFEST.json",
        "ckpt/0000000030-a0001/model.safetensors",
        "ckpt/0000000030-a0001/state.json",
    ]


def test_an_older_attempt_is_fenced_at_every_door(objects: Objects) -> None:
    old, new = ledger_of(objects, 2), ledger_of(objects, 3)
    old.acquire()
    new.acquire()
    before = dict(objects.content)
    with pytest.raises(Fenced, match="attempt 3"):
        old.publish(snapshot(40))
    with pytest.raises(Fenced):
        ledger_of(objects, 2).acquire()
    assert objects.content["HEAD.json"] == before["HEAD.json"]
    new.publish(snapshot(40))


def test_of_two_starts_of_one_attempt_the_later_publishes_under_keys_of_its_own(objects: Objects) -> None:
    first, second = ledger_of(objects, 2), ledger_of(objects, 2)
    assert first.acquire().lease == Lease(2, 0)
    assert second.acquire().lease == Lease(2, 1)
    with pytest.raises(Fenced):
        first.publish(snapshot(40))
    assert second.publish(snapshot(40)).key == "ckpt/0000000040-a0002r1"


def test_another_process_publishes_under_an_adopted_lease(objects: Objects) -> None:
    lease = ledger_of(objects, 2).acquire().lease
    uploader = ledger_of(objects, 2)
    with pytest.raises(RuntimeError, match="acquire"):
        uploader.publish(snapshot(40))
    uploader.adopt(lease)
    assert uploader.publish(snapshot(40)).step == 40
    with pytest.raises(ValueError, match="attempt"):
        uploader.adopt(Lease(3, 0))


def test_a_changed_spec_is_refused_without_taking_the_fence(objects: Objects) -> None:
    with pytest.raises(SpecChanged, match="undo the change"):
        ledger_of(objects, 2, run_spec_sha="other").acquire()
    assert head_of(objects).fence == 1


DAMAGE: list[Callable[[dict, str], object]] = [
    lambda content, folder: content.pop(f"{folder}/model.safetensors"),
    lambda content, folder: content.pop(f"{folder}/MANIFEST.json"),
    lambda content, folder: content.pop(f"{folder}/state.json"),
    lambda content, folder: flip(content, f"{folder}/model.safetensors"),
    lambda content, folder: flip(content, f"{folder}/MANIFEST.json"),
    lambda content, folder: cut(content, f"{folder}/model.safetensors"),
    lambda content, folder: content.update({f"{folder}/state.json": (b"", 0.0)}),
]


def flip(content: dict, key: str) -> None:
    data, modified = content[key]
    content[key] = (data[:-1] + bytes([data[-1] ^ 1]), modified)


def cut(content: dict, key: str) -> None:
    data, modified = content[key]
    content[key] = (data[:-1], modified)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_marked_reported_and_skipped(objects: Objects, damage: Callable) -> None:
    damage(objects.content, "ckpt/0000000030-a0001")
    warned: list[str] = []
    ledger = ledger_of(objects, 2, warned=warned)
    ledger.acquire()
    found = ledger.load()
    assert found is not None
    assert found.step == 20
    assert found.tensors["model"]["w"].tolist() == [20.0] * 8
    assert ledger.loaded is not None
    assert ledger.loaded.step == 20
    assert [(e.step, e.bad) for e in head_of(objects).history] == [(20, False), (30, True)]
    assert len(warned) == 1
    assert "step 30" in warned[0]
    # Training goes on from 20, past the damaged 30.
    ledger.publish(snapshot(25))
    assert [e.step for e in head_of(objects).history] == [20, 30, 25]
    again = ledger_of(objects, 3).load()
    assert again is not None
    assert again.step == 25
    ledger.publish(snapshot(30))
    assert [(e.step, e.key) for e in head_of(objects).history] == [
        (25, "ckpt/0000000025-a0002"),
        (30, "ckpt/0000000030-a0002"),
    ]


@pytest.mark.parametrize("steps", [(25, 30), (30,)])
def test_a_run_that_goes_back_beyond_a_damaged_checkpoint_publishes_it_again(objects: Objects, steps: tuple) -> None:
    """Within one attempt, so that the folder is the same; what publishes does not know of the damage."""
    trainer, uploader = ledger_of(objects, 2), ledger_of(objects, 2)
    uploader.adopt(trainer.acquire().lease)
    uploader.publish(snapshot(30 + 10))
    damaged = "ckpt/0000000040-a0002"
    flip(objects.content, f"{damaged}/state.json")
    trainer.look_again()
    found = trainer.load()
    assert found is not None
    assert found.step == 30
    for step in (*(10 + step for step in steps),):
        uploader.publish(snapshot(step))
    history = head_of(objects).history
    assert [(entry.step, entry.key, entry.bad) for entry in history][-1] == (40, damaged, False)
    assert sum(entry.key == damaged for entry in history) == 1
    again = ledger_of(objects, 3).load()
    assert again is not None
    assert again.step == 40


def test_a_reader_without_the_fence_marks_nothing(objects: Objects) -> None:
    flip(objects.content, "ckpt/0000000030-a0001/state.json")
    found = ledger_of(objects, 0).load()
    assert found is not None
    assert found.step == 20
    assert not any(entry.bad for entry in head_of(objects).history)


def test_when_all_are_damaged_it_never_starts_again_from_zero(objects: Objects) -> None:
    for folder in ("ckpt/0000000020-a0001", "ckpt/0000000030-a0001"):
        flip(objects.content, f"{folder}/state.json")
    for attempt in (2, 3):  # also when they were marked before
        ledger = ledger_of(objects, attempt)
        ledger.acquire()
        with pytest.raises(CheckpointCorrupt, match="none of the 2 published"):
            ledger.load()


@pytest.mark.parametrize("error", [PermissionDenied, StorageUnavailable])
def test_a_store_that_does_not_answer_is_not_taken_for_damage(objects: Objects, error: type[StorageError]) -> None:
    def refuse(operation: str, key: str, _: When) -> None:
        if "model.safetensors" in key:
            raise error(f"{operation} {key}")

    ledger = Ledger(TappedStore(MemoryStore(objects), refuse), attempt=2, run_spec_sha="spec")
    ledger.acquire()
    with pytest.raises(error):
        ledger.load()
    assert not any(entry.bad for entry in head_of(objects).history)

    def refuse_all(operation: str, key: str, _: When) -> None:
        raise error(f"{operation} {key}")

    with pytest.raises(error):
        Ledger(TappedStore(MemoryStore(objects), refuse_all), attempt=2, run_spec_sha="spec").load()


def test_a_store_without_conditional_writes_is_refused() -> None:
    ledger = Ledger(MemoryStore(Objects(), conditional=False), attempt=1, run_spec_sha="spec")
    with pytest.raises(CheckpointUnsupported, match=r"memory:///.*conditional writes.*use a bucket"):
        ledger.acquire()


def test_what_a_newer_release_wrote_is_refused_and_not_taken_for_damage(objects: Objects) -> None:
    newer = objects.content["HEAD.json"][0].replace(b'"version": 1', b'"version": 2')
    objects.content["HEAD.json"] = (newer, 0.0)
    with pytest.raises(CheckpointUnsupported, match="version 2"):
        ledger_of(objects, 2).acquire()


def test_a_head_that_is_no_head_is_refused(objects: Objects) -> None:
    for data in (b"", b"{}", b"[]", b'{"version": 1, "fence": 1}', b"\xff"):
        objects.content["HEAD.json"] = (data, 0.0)
        with pytest.raises(CheckpointCorrupt, match=r"not a HEAD\.json"):
            ledger_of(objects, 2).acquire()


def test_steps_only_go_forward_and_the_same_step_is_published_once(objects: Objects) -> None:
    ledger = ledger_of(objects, 2)
    ledger.acquire()
    before = dict(objects.content)
    assert ledger.publish(snapshot(30)).key == "ckpt/0000000030-a0001"
    assert objects.content == before
    with pytest.raises(ValueError, match="only go forward"):
        ledger.publish(snapshot(29))


def test_starting_over_is_possible_on_purpose_only(objects: Objects) -> None:
    ledger = ledger_of(objects, 2)
    ledger.acquire()
    with pytest.raises(ValueError, match="only go forward"):
        ledger.publish(snapshot(1))
    assert ledger.start_over().history == ()
    assert ledger.load() is None
    ledger.publish(snapshot(1))
    assert [entry.key for entry in head_of(objects).history] == ["ckpt/0000000001-a0002"]
    assert "ckpt/0000000030-a0001/state.json" in objects.content  # for a day, in case it was a mistake
    with pytest.raises(RuntimeError, match="acquire"):
        ledger_of(objects, 3).start_over()


def test_the_best_checkpoint_is_pinned_until_a_better_one_comes(objects: Objects) -> None:
    ledger = ledger_of(objects, 2, retention=Retention(keep_last=1))
    ledger.acquire()
    ledger.publish(snapshot(40), best=("val_loss", 0.5))
    ledger.publish(snapshot(50))
    ledger.publish(snapshot(60))
    head = head_of(objects)
    assert [e.step for e in head.history] == [40, 60]
    assert head.best is not None
    assert (head.best.step, head.best.metric, head.best.value) == (40, "val_loss", 0.5)
    ledger.publish(snapshot(70), best=("val_loss", 0.4))
    assert [e.step for e in head_of(objects).history] == [70]
    assert {key.split("/")[1] for key in objects.content if key.startswith("ckpt/")} == {"0000000070-a0002"}


def test_the_best_checkpoint_is_read_by_who_did_not_publish_it(objects: Objects) -> None:
    """As in a run: one process has the fence, and another, which adopted it, publishes."""
    leader = ledger_of(objects, 2)
    leader.acquire()
    assert leader.best is None
    assert leader.load_best() is None
    uploader = ledger_of(objects, 2)
    uploader.adopt(Lease(2, 0))
    uploader.publish(snapshot(40))
    uploader.publish(snapshot(40), best=("val_loss", 0.5))  # pinned after it was published
    for step in (50, 60, 70):
        uploader.publish(snapshot(step))
    found = leader.load_best()
    assert found is not None
    assert (found.step, found.tensors["model"]["w"][0]) == (40, 40)
    assert leader.best is not None
    assert leader.best.step == 40
    objects.content.pop("ckpt/0000000040-a0002/model.safetensors")
    with pytest.raises(CheckpointCorrupt, match="0000000040"):
        leader.load_best()


def test_orphans_go_only_when_they_are_old_and_of_an_older_attempt(objects: Objects) -> None:
    store = MemoryStore(objects)
    for folder in ("0000000035-a0001", "0000000035-a0002", "0000000035-a0009", "someone-elses"):
        store.put(f"ckpt/{folder}/model.safetensors", b"x")
    store.put("dataset.lock.json", b"{}")
    ledger = ledger_of(objects, 2)
    ledger.acquire()
    ledger.publish(snapshot(40))
    left = {key.split("/")[1] for key in objects.content if "35-" in key or "some" in key}
    assert left == {"0000000035-a0001", "0000000035-a0009", "someone-elses"}  # own remains go at once
    objects.now += 25 * 3600
    ledger.publish(snapshot(50))
    left = {key.split("/")[1] for key in objects.content if "35-" in key or "some" in key}
    assert left == {"0000000035-a0009", "someone-elses"}
    assert "dataset.lock.json" in objects.content


def test_a_zombie_whose_upload_was_swept_is_fenced(objects: Objects) -> None:
    """Found by the model check: it ended with NotFound, the exit code for a missing input of the user."""
    successor = ledger_of(objects, 3)

    def sleep_for_two_days(operation: str, key: str, when: When) -> None:
        if (operation, when) == ("put_file", "after") and "state.json" in key:
            objects.now += 48 * 3600
            successor.acquire()
            successor.publish(snapshot(35))

    zombie = Ledger(TappedStore(MemoryStore(objects), sleep_for_two_days), attempt=2, run_spec_sha="spec")
    zombie.acquire()
    with pytest.raises(Fenced, match="attempt 3"):
        zombie.publish(snapshot(40))


def test_an_upload_that_somebody_deletes_is_reported(objects: Objects) -> None:
    def delete(operation: str, key: str, when: When) -> None:
        if (operation, when) == ("put_file", "after"):
            del objects.content[key]

    ledger = Ledger(TappedStore(MemoryStore(objects), delete), attempt=2, run_spec_sha="spec")
    ledger.acquire()
    with pytest.raises(StorageUnavailable, match="what else deletes below"):
        ledger.publish(snapshot(40))


def test_garbage_that_cannot_be_deleted_is_a_warning(objects: Objects) -> None:
    def refuse(operation: str, key: str, _: When) -> None:
        if operation == "delete":
            raise PermissionDenied(f"{operation} {key}: no s3:DeleteObject")

    warned: list[str] = []
    ledger = Ledger(TappedStore(MemoryStore(objects), refuse), attempt=2, run_spec_sha="spec", on_warning=warned.append)
    ledger.acquire()
    assert ledger.publish(snapshot(40)).step == 40
    assert "s3:DeleteObject" in warned[0]


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="keepLast"):
        Retention(keep_last=0)
