"""Of several operators one is active; nobody takes over while another may still trust its Lease. Time is played."""

import asyncio
import copy
import heapq
from typing import Any

import pytest

from diffusion_operator.errors import ConflictError, ExistsError, NotFoundError, UnavailableError
from diffusion_operator.leadership import Claim, Leadership

SECONDS = 15


class Time:
    """Sleepers wake up in order; nobody else makes time pass."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, future))
        await future

    async def pass_(self, seconds: float) -> None:
        until = self.now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= until:
            self.now, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)
            await settle()
        self.now = until


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Stored:
    """The Lease in the API server, as one operator reaches it, or does not."""

    lease: dict[str, Any] | None

    def __init__(self) -> None:
        self.lease = None
        self.down: set[str] = set()

    def seen_by(self, identity: str) -> "Access":
        return Access(self, identity)


class Access:
    def __init__(self, stored: Stored, identity: str) -> None:
        self.stored, self.identity = stored, identity

    def _reach(self) -> None:
        if self.identity in self.stored.down:
            raise UnavailableError("no answer")

    async def get_lease(self, namespace: str, name: str) -> dict[str, Any]:
        self._reach()
        if self.stored.lease is None:
            raise NotFoundError(f"{namespace}/{name}")
        return copy.deepcopy(self.stored.lease)

    async def create_lease(self, lease: dict[str, Any]) -> dict[str, Any]:
        self._reach()
        if self.stored.lease is not None:
            raise ExistsError("exists")
        return self._store(lease, 1)

    async def replace_lease(self, lease: dict[str, Any]) -> dict[str, Any]:
        self._reach()
        assert self.stored.lease is not None
        version = self.stored.lease["metadata"]["resourceVersion"]
        if lease["metadata"]["resourceVersion"] != version:
            raise ConflictError("changed")
        return self._store(lease, version + 1)

    def _store(self, lease: dict[str, Any], version: int) -> dict[str, Any]:
        stored = copy.deepcopy(lease)
        stored["metadata"]["resourceVersion"] = version
        self.stored.lease = stored
        return stored


class Group:
    """Operators that want the same Lease."""

    def __init__(self) -> None:
        self.time = Time()
        self.stored = Stored()
        self.members: dict[str, Leadership] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def join(self, name: str, identity: str = "") -> None:
        claim = Claim(namespace="system", name="operator", identity=identity or name, seconds=SECONDS)
        member = Leadership(self.stored.seen_by(name), claim, monotonic=lambda: self.time.now, sleep=self.time.sleep)
        self.members[name] = member

        async def work() -> None:
            await member.acquire()
            await member.hold()

        self.tasks[name] = asyncio.get_running_loop().create_task(work())

    def kill(self, name: str) -> None:
        self.tasks[name].cancel()

    def active(self) -> list[str]:
        return [name for name, member in self.members.items() if member.held() and not self.tasks[name].cancelled()]

    async def pass_(self, seconds: int) -> None:
        for _ in range(seconds):
            await self.time.pass_(1)
            assert len(self.active()) <= 1, self.active()

    def spec(self) -> dict[str, Any]:
        assert self.stored.lease is not None
        return self.stored.lease["spec"]


@pytest.fixture
async def group():
    found = Group()
    yield found
    for task in found.tasks.values():
        task.cancel()
    await asyncio.gather(*found.tasks.values(), return_exceptions=True)


async def test_one_of_two_is_active_and_stays_so(group: Group):
    group.join("a")
    group.join("b")
    await group.pass_(200)
    assert group.active() == ["a"]
    assert (group.spec()["holderIdentity"], group.spec()["leaseTransitions"]) == ("a", 0)


async def test_another_takes_over_from_one_that_died_but_not_before_its_time(group: Group):
    group.join("a")
    await group.pass_(1)
    group.join("b")
    await group.pass_(20)
    group.kill("a")
    await group.pass_(SECONDS - 4)
    assert group.active() == [], "the last renewal was at most 3 s ago"
    await group.pass_(8)
    assert group.active() == ["b"]
    assert (group.spec()["holderIdentity"], group.spec()["leaseTransitions"]) == ("b", 1)


async def test_what_is_given_up_is_taken_at_the_next_look(group: Group):
    group.join("a")
    await group.pass_(1)
    group.join("b")
    await group.pass_(5)
    group.kill("a")
    await group.members["a"].release()
    await group.pass_(3)
    assert group.active() == ["b"]


async def test_one_that_is_started_again_in_its_place_need_not_wait(group: Group):
    group.join("a")
    await group.pass_(1)
    group.kill("a")
    group.join("a again", identity="a")
    await group.pass_(1)
    assert group.active() == ["a again"]
    assert group.spec()["leaseTransitions"] == 0


async def test_a_holder_without_the_api_server_ends_before_anybody_takes_over(group: Group):
    group.join("a")
    await group.pass_(1)
    group.join("b")
    await group.pass_(20)
    group.stored.down.add("a")
    await group.pass_(SECONDS * 2 // 3 + 3)
    assert group.tasks["a"].done(), "it waits for nobody to be told"
    assert group.active() == []
    await group.pass_(8)
    assert group.active() == ["b"]


async def test_an_api_server_that_is_away_for_a_moment_changes_nothing(group: Group):
    group.join("a")
    await group.pass_(4)
    group.stored.down.add("a")
    await group.pass_(5)
    group.stored.down.clear()
    await group.pass_(60)
    assert group.active() == ["a"]


async def test_one_that_was_stopped_for_a_while_finds_that_it_has_lost(group: Group):
    group.join("a")
    await group.pass_(1)
    lease = group.stored.lease
    assert lease is not None
    lease["spec"] |= {"holderIdentity": "b", "leaseTransitions": 1}
    lease["metadata"]["resourceVersion"] += 1
    group.time.now += 100
    assert not group.members["a"].held(), "before it has asked anybody"
    await group.pass_(4)
    assert group.tasks["a"].done()


async def test_without_anybody_to_give_up_to_nothing_is_written(group: Group):
    group.join("a")
    await group.pass_(1)
    await group.members["a"].release()
    written = copy.deepcopy(group.stored.lease)
    await group.members["a"].release()
    assert group.stored.lease == written
