"""The publisher with its real process, on a folder and on a real S3 server."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from diffusion_trainer.checkpoint import Ledger, Publisher, Retention, Snapshot, Target
from diffusion_trainer.errors import BucketMissing, Fenced, StorageUnavailable, UploaderDied
from diffusion_trainer.objectstore import Credentials, ObjectStore, open_store
from diffusion_trainer.objectstore.settings import MIB, TransferSettings
from testkit.objectstore import folder_store, open_deadly, open_held
from testkit.s3 import S3Server, refused_endpoint

Opener = Callable[[], ObjectStore]


def snapshot(step: int, size: int = 1000) -> Snapshot:
    return Snapshot(step, {"model": {"w": torch.full((size,), float(step))}}, {"step": step})


def target_of(opener: Opener, attempt: int = 1) -> Target:
    """Take the fence, as the supervisor does."""
    lease = Ledger(opener(), attempt=attempt, run_spec_sha="spec").acquire().lease
    return Target(opener, lease, "spec", Retention(keep_last=2))


def resumed(opener: Opener, attempt: int = 9) -> Snapshot | None:
    ledger = Ledger(opener(), attempt=attempt, run_spec_sha="spec")
    ledger.acquire()
    return ledger.load()


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return folder_store(tmp_path / "store")


@pytest.fixture
def fifos(tmp_path: Path) -> dict[str, Path]:
    found = {"reached": tmp_path / "reached", "release": tmp_path / "release"}
    for path in found.values():
        os.mkfifo(path)
    return found


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return tmp_path / "staging"


def test_saves_are_acknowledged_measured_and_found_again(opener: Opener, staging: Path) -> None:
    with Publisher(target_of(opener), staging=staging) as publisher:
        assert (publisher.committed, publisher.saved, publisher.in_flight) == (None, None, None)
        publisher.save(snapshot(1), wait=True)
        assert publisher.committed == 1
        saved = publisher.saved
        assert saved is not None
        assert saved.entry.key == "ckpt/0000000001-a0001"
        assert saved.size_bytes > 4000
        assert saved.stall_seconds > 0
        assert saved.upload_seconds > 0
        publisher.save(snapshot(2), best=("loss", 0.5))
        assert publisher.flush(deadline_seconds=float("inf"))
        assert publisher.committed == 2
    assert list(staging.glob("snapshot-*")) == []
    assert publisher.close()  # again
    with pytest.raises(UploaderDied, match="was closed"):
        publisher.try_save(snapshot(3))
    found = resumed(opener)
    assert found is not None
    assert (found.step, found.scalars, found.tensors["model"]["w"].tolist()) == (2, {"step": 2}, [2.0] * 1000)


def test_training_goes_on_while_an_upload_is_in_flight(opener: Opener, staging: Path, fifos: dict[str, Path]) -> None:
    held = partial(open_held, opener, at="put_file ckpt/0000000001-a0001/model", **fifos)
    target = target_of(opener)
    with Publisher(Target(held, target.lease, "spec"), staging=staging) as publisher:
        weights = torch.ones(1000)
        assert publisher.try_save(Snapshot(1, {"model": {"w": weights}}, {}))
        fifos["reached"].read_text()
        weights.zero_()  # the next optimizer step
        assert not publisher.try_save(snapshot(2))
        assert (publisher.skipped, publisher.in_flight, publisher.committed) == (1, 1, None)
        assert not publisher.flush(deadline_seconds=0)
        fifos["release"].write_text("")
        assert publisher.flush(deadline_seconds=60)
        assert publisher.try_save(snapshot(3))
    found = resumed(opener)
    assert found is not None
    assert found.step == 3
    first = Ledger(opener(), attempt=0, run_spec_sha="spec")
    history = Ledger(opener(), attempt=10, run_spec_sha="spec").acquire().history
    assert first.read(history[0]).tensors["model"]["w"].tolist() == [1.0] * 1000


@pytest.mark.parametrize("at", ["put_file ckpt/0000000002-a0001/state", "put ckpt/0000000002-a0001/MANIFEST"])
def test_an_uploader_killed_in_the_middle_loses_nothing_acknowledged(
    opener: Opener, staging: Path, fifos: dict[str, Path], at: str
) -> None:
    target = target_of(opener)
    held = Target(partial(open_held, opener, at=at, **fifos), target.lease, "spec")
    publisher = Publisher(held, staging=staging)
    publisher.save(snapshot(1), wait=True)
    assert publisher.try_save(snapshot(2))
    fifos["reached"].read_text()
    pid = publisher._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UploaderDied, match="SIGKILL; step 2 was not acknowledged; the last acknowledged step is 1"):
        publisher.flush(deadline_seconds=60)
    with pytest.raises(UploaderDied):
        publisher.try_save(snapshot(3))
    with pytest.raises(UploaderDied):
        publisher.close()
    assert publisher.close()
    assert publisher.committed == 1
    assert list(staging.glob("snapshot-*")) == []
    found = resumed(opener)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize(("when", "step"), [("before", 1), ("after", 2)])
def test_an_uploader_that_dies_at_the_commit_leaves_the_old_or_the_new(
    opener: Opener, staging: Path, when: str, step: int
) -> None:
    target = target_of(opener)
    with Publisher(target, staging=staging) as publisher:
        publisher.save(snapshot(1), wait=True)
    deadly = Target(partial(open_deadly, opener, at="put HEAD.json", when=when), target.lease, "spec")
    with pytest.raises(UploaderDied, match="step 2 was not acknowledged"), Publisher(deadly, staging=staging) as second:
        second.save(snapshot(2), wait=True)
    found = resumed(opener)
    assert found is not None
    assert found.step == step


def test_a_newer_attempt_fences_the_publisher_of_the_older(opener: Opener, staging: Path) -> None:
    with Publisher(target_of(opener, 1), staging=staging) as old:
        old.save(snapshot(1), wait=True)
        with Publisher(target_of(opener, 2), staging=staging) as new:
            new.save(snapshot(2), wait=True)
        with pytest.raises(Fenced, match="attempt 2"):
            old.save(snapshot(3), wait=True)
    found = resumed(opener)
    assert found is not None
    assert found.step == 2


def test_failures_of_the_store_reach_the_trainer_and_saving_can_go_on(opener: Opener, staging: Path) -> None:
    lease = target_of(opener).lease
    with refused_endpoint() as endpoint:
        impatient = TransferSettings(retries=0, connect_timeout_seconds=1)
        down = partial(open_store, "s3://bucket/", endpoint_url=endpoint, settings=impatient)
        os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
        try:
            with Publisher(Target(down, lease, "spec"), staging=staging) as publisher:
                assert publisher.try_save(snapshot(1))
                with pytest.raises(StorageUnavailable, match="check that the store is up"):
                    publisher.flush(deadline_seconds=60)
                assert publisher.in_flight is None
                publisher.poll()  # told once
                with pytest.raises(StorageUnavailable):
                    publisher.save(snapshot(2), wait=True)
        finally:
            del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]


def test_an_upload_that_is_not_done_at_the_deadline_is_broken_off(
    opener: Opener, staging: Path, fifos: dict[str, Path]
) -> None:
    target = target_of(opener)
    held = Target(partial(open_held, opener, at="put_file", **fifos), target.lease, "spec")
    publisher = Publisher(held, staging=staging)
    publisher.save(snapshot(1))
    fifos["reached"].read_text()
    assert not publisher.close(deadline_seconds=0)
    assert publisher._process.exitcode == -signal.SIGKILL
    assert list(staging.glob("snapshot-*")) == []
    assert resumed(opener) is None


def test_a_failure_in_training_is_not_hidden_by_one_of_the_upload(opener: Opener, staging: Path) -> None:
    target = target_of(opener, 1)
    target_of(opener, 2)

    def train() -> None:
        with Publisher(target, staging=staging) as publisher:
            publisher.save(snapshot(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert "attempt 2" in caught.value.__notes__[0]


TRAINER = """
import os, sys, torch
from functools import partial
from pathlib import Path
from diffusion_trainer.checkpoint import Ledger, Publisher, Snapshot, Target
from testkit.objectstore import folder_store, open_held

store, staging, reached, release = map(Path, sys.argv[1:5])
if __name__ == "__main__":
    opener = folder_store(store)
    lease = Ledger(opener(), attempt=1, run_spec_sha="spec").acquire().lease
    held = partial(open_held, opener, at="put_file ckpt/0000000001-a0001/model", reached=reached, release=release)
    publisher = Publisher(Target(held, lease, "spec"), staging=staging)
    publisher.try_save(Snapshot(1, {"model": {"w": torch.ones(10)}}, {}))
    print(publisher._process.pid, flush=True)
    sys.stdin.read()
"""


def test_an_upload_in_flight_is_finished_when_the_trainer_is_killed(
    opener: Opener, tmp_path: Path, staging: Path, fifos: dict[str, Path]
) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    paths = [str(tmp_path / "store"), str(staging), str(fifos["reached"]), str(fifos["release"])]
    trainer = subprocess.Popen(
        [sys.executable, str(script), *paths],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with trainer:
        assert trainer.stdout is not None
        uploader = os.pidfd_open(int(trainer.stdout.readline()))
        fifos["reached"].read_text()
        trainer.kill()
        trainer.wait()
    fifos["release"].write_text("")
    wait_for_end(uploader)
    found = resumed(opener, 2)
    assert found is not None
    assert found.step == 1
    # The next attempt on the same volume clears up after the dead one.
    with Publisher(target_of(opener, 10), staging=staging):
        assert len(list(staging.glob("snapshot-*"))) == 1


def wait_for_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], 60)[0], "the uploader did not end by itself"
    os.close(pidfd)


# --- on S3 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Credentials]:
    folder = tmp_path_factory.mktemp("secret")
    with S3Server(buckets=["checkpoints"]) as server:
        for name, value in server.credentials.environment.items():
            (folder / name).write_text(value)
        yield Credentials.from_folder(folder)


def test_large_files_go_in_parts_to_a_real_server(s3: Credentials, staging: Path) -> None:
    parts = TransferSettings(part_bytes=5 * MIB, multipart_bytes=5 * MIB, parallel=3)
    opener = partial(open_store, "s3://checkpoints/job-uid/", credentials=s3, settings=parts)
    with Publisher(target_of(opener), staging=staging) as publisher:
        for step in (1, 2, 3):
            publisher.save(snapshot(step, size=3 * MIB), wait=True)
    store = opener()
    assert store.head("ckpt/0000000003-a0001/model.safetensors").etag.strip('"').endswith("-3")  # three parts
    assert {info.key.split("/")[1] for info in store.list("ckpt/")} == {"0000000002-a0001", "0000000003-a0001"}
    found = resumed(opener)
    assert found is not None
    assert found.step == 3
    assert bool((found.tensors["model"]["w"] == 3.0).all())


def test_a_missing_bucket_is_named(s3: Credentials) -> None:
    with pytest.raises(BucketMissing, match="no-such-bucket"):
        target_of(partial(open_store, "s3://no-such-bucket/", credentials=s3))
