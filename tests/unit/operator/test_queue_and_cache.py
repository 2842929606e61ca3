"""The work queue and the caches: what may be believed, and when it is worked on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from diffusion_operator.cache import Cache, Listing, PodCache
from diffusion_operator.workqueue import LONGEST_BACKOFF_SECONDS, WorkQueue
from testkit.builders import Object, deleting, make_job, make_pod


@dataclass
class Timer:
    """A timer that the test lets off."""

    seconds: float
    fire: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Timers:
    """Stands in for the event loop's `call_later`."""

    set: list[Timer] = field(default_factory=list)

    def __call__(self, seconds: float, fire: Callable[[], None]) -> Timer:
        self.set.append(Timer(seconds, fire))
        return self.set[-1]


class TestQueue:
    async def test_a_key_is_queued_once(self) -> None:
        queue = WorkQueue()
        for key in "aba":
            queue.add(key)
        assert [await queue.get(), await queue.get(), len(queue)] == ["a", "b", 0]

    async def test_one_worker_per_key_and_no_change_is_missed(self) -> None:
        queue = WorkQueue()
        queue.add("a")
        assert await queue.get() == "a"
        queue.add("a")
        assert len(queue) == 0
        queue.done("a")
        assert await queue.get() == "a"
        queue.done("a")
        assert len(queue) == 0

    async def test_a_waiting_worker_is_woken(self) -> None:
        queue = WorkQueue()
        worker = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        queue.add("a")
        assert await worker == "a"

    async def test_the_sooner_of_two_timers_stays(self) -> None:
        timers = Timers()
        queue = WorkQueue(schedule=timers)
        queue.add_after("a", 10)
        queue.add_after("a", 20)
        queue.add_after("a", 5)
        assert [(timer.seconds, timer.cancelled) for timer in timers.set] == [(10, True), (5, False)]
        timers.set[-1].fire()
        assert await queue.get() == "a"
        queue.add_after("a", 7)
        assert timers.set[-1].seconds == 7

    async def test_failures_back_off_with_jitter_up_to_a_minute(self) -> None:
        timers = Timers()
        queue = WorkQueue(schedule=timers, jitter=lambda: 1.0)
        pauses = []
        for _ in range(12):
            pauses.append(queue.add_failed("a"))
            timers.set[-1].fire()
        assert pauses[:4] == [0.2, 0.4, 0.8, 1.6]
        assert pauses[-1] == LONGEST_BACKOFF_SECONDS
        queue.forgive("a")
        assert queue.add_failed("a", at_least_seconds=3) == 3
        least = WorkQueue(schedule=timers, jitter=lambda: 0.0)
        assert least.add_failed("a") == 0.1

    async def test_a_dropped_key_leaves_no_timer(self) -> None:
        timers = Timers()
        queue = WorkQueue(schedule=timers)
        queue.add_after("a", 10)
        queue.drop("a")
        assert timers.set[0].cancelled


def job(version: int, uid: str = "u") -> Object:
    return make_job(uid=uid, metadata={"resourceVersion": str(version)})


class TestCache:
    def test_nothing_older_replaces_what_is_known(self) -> None:
        cache = Cache()
        assert [cache.put(job(5)), cache.put(job(5)), cache.put(job(4)), cache.put(job(6))] == [
            True,
            False,
            False,
            True,
        ]

    def test_a_list_shows_what_vanished(self) -> None:
        cache = Cache()
        cache.put(job(5, "gone"))
        cache.put(job(5, "same"))
        changed = cache.replace(Listing(items=(job(5, "same"), job(9, "new")), resource_version=9))
        assert sorted(item["metadata"]["uid"] for item in changed) == ["gone", "new"]
        assert cache.get("gone") is None

    def test_what_is_newer_than_the_list_did_not_vanish(self) -> None:
        """The list was made before the operator's own create, and arrives after it."""
        cache = Cache()
        cache.put(job(12, "created"))
        assert cache.replace(Listing(items=(), resource_version=11)) == []
        assert cache.get("created") is not None


class TestPodCache:
    JOB = make_job(uid="owner")

    def pod(self, version: int = 10, **more: str) -> Object:
        return make_pod(self.JOB, metadata={"resourceVersion": str(version)}, **more)  # type: ignore[arg-type]

    def test_a_deleted_pod_stays_as_the_deletion_showed_it(self) -> None:
        cache = PodCache()
        cache.put(self.pod(phase="Running"))
        assert cache.remove(self.pod(11, phase="Failed"))
        (seen,) = cache.of_job("owner")
        assert (seen.gone, seen.phase) == (True, "Failed")

    def test_a_late_event_does_not_bring_it_back(self) -> None:
        cache = PodCache()
        cache.put(self.pod())
        cache.remove(self.pod(11))
        assert not cache.put(self.pod(10))
        assert [pod.gone for pod in cache.of_job("owner")] == [True]

    def test_it_is_forgotten_when_its_attempt_is_judged(self) -> None:
        cache = PodCache()
        cache.put(self.pod())
        cache.remove(self.pod(11))
        cache.bury("owner", before_attempt=1)
        assert len(cache.of_job("owner")) == 1
        cache.bury("owner", before_attempt=2)
        assert cache.of_job("owner") == ()

    def test_a_pod_without_a_controller_belongs_to_nobody(self) -> None:
        cache = PodCache()
        cache.put(make_pod(self.JOB, metadata={"ownerReferences": []}))
        assert cache.of_job("owner") == ()


def test_of_a_deletion_the_request_is_remembered_and_not_the_removal() -> None:
    """Found in recordings: a killed pod looked as if it had ended by itself before somebody deleted it."""
    job, pods = make_job(), PodCache()
    asked = make_pod(job, metadata={**deleting(asked=-30, grace=30), "resourceVersion": "11"})
    pods.put(make_pod(job))
    pods.put(asked)
    removed = make_pod(job, metadata={**deleting(asked=9, grace=0), "resourceVersion": "12"})
    pods.put(removed)
    pods.remove({**removed, "metadata": {**removed["metadata"], "resourceVersion": "13"}})
    (seen,) = pods.of_job(job["metadata"]["uid"])
    assert seen.gone
    kept = {key: seen.raw["metadata"][key] for key in deleting()}
    assert kept == deleting(asked=-30, grace=30)


def test_managed_fields_are_not_kept_and_not_taken_from_their_owner() -> None:
    job = make_job(metadata={"managedFields": [{"manager": "kubectl"}]})
    cache = Cache()
    assert cache.put(job)
    (kept,) = cache
    assert kept["metadata"] == {key: value for key, value in job["metadata"].items() if key != "managedFields"}
    assert job["metadata"]["managedFields"]
