"""Uploads on the way: the newest of each key arrives, and what failed is tried once more at the end."""

from dataclasses import dataclass, field

import pytest

from diffusion_trainer.courier import Courier
from diffusion_trainer.errors import BadConfig, StorageUnavailable


@dataclass
class FakeStore:
    failures: int = 0
    objects: dict = field(default_factory=dict)

    def put(self, key, data):
        if self.failures:
            self.failures -= 1
            raise StorageUnavailable(f"put {key}: down")
        self.objects[key] = data

    def put_file(self, key, path):
        self.put(key, path.read_bytes())


def test_a_courier_delivers_bytes_and_files_before_it_leaves(tmp_path):
    store = FakeStore()
    (tmp_path / "events").write_bytes(b"e")
    with Courier(store, on_warning=pytest.fail) as courier:
        courier.send("metrics.jsonl", b"1")
        courier.send("metrics.jsonl", b"2")
        courier.send("events", tmp_path / "events")
    assert store.objects == {"metrics.jsonl": b"2", "events": b"e"}


def test_what_failed_is_sent_once_more_at_the_end():
    warnings = []
    store = FakeStore(failures=1)
    with Courier(store, on_warning=warnings.append) as courier:
        courier.send("a", b"1")
    assert store.objects == {"a": b"1"}
    assert warnings == ["upload a: put a: down"]


def test_a_store_that_stays_down_ends_the_run():
    with pytest.raises(StorageUnavailable), Courier(FakeStore(failures=2), on_warning=lambda _: None) as courier:
        courier.send("a", b"1")


def test_nobody_waits_for_uploads_of_a_run_that_failed():
    store = FakeStore(failures=9)
    with pytest.raises(BadConfig), Courier(store, on_warning=lambda _: None):
        raise BadConfig("x")
    assert store.objects == {}
