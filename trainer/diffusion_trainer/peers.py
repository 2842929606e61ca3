"""The training processes of a job, as seen from one of them: what they decide, wait for and add up together.

Two ways to speak. `agree` and `add_up` are collectives, one each per optimizer step, which every process must call in
the same order. Everything else goes through a key-value store in rank 0's pod, never blocks for longer than a fraction
of a second at a time, and so can be interrupted by a stop at any place without leaving anybody stuck.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from diffusion_trainer.errors import PeerLost, PeersDiffer
from diffusion_trainer.fitting import in_parts, is_shortage
from diffusion_trainer.settings import Place

GOODBYE, STOP = "goodbye", "stop"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.002, 0.2
SPREAD_SECONDS = 0.5
STORE_SECONDS = 60.0
"""How long one answer of the store may take, the first one included."""
PIECE_CHARACTERS = 4 << 20
"""Of what is told at once: the store hangs up on whoever sends more than 8 MiB."""


class Peers:
    """Of a run of one process: nobody to agree with, or to wait for."""

    rank = 0
    world_size = 1
    local_rank = 0

    @property
    def leads(self) -> bool:
        """Return whether this is rank 0, which alone has the fence, speaks to the world, and writes."""
        return self.rank == 0

    @property
    def part(self) -> slice:
        """Return which entries of a sequence are this process's, where work is dealt out."""
        return slice(self.rank, None, self.world_size)

    def begin_chapter(self, name: str) -> None:
        """Let names that were used before mean something new from here on. All processes call it alike."""

    def agree(self, wish: bool) -> bool:
        """Return whether any process wishes it. A collective of the hosts; the devices go on meanwhile."""
        return wish

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors (of one dtype, on one device) by their sums over all processes, the same bits everywhere.

        A collective; a host with a GPU goes on. It takes little memory beside the tensors (`fitting.in_parts`).
        """

    def as_leader_says(self, _name: str, value: Any) -> Any:
        """Return the leader's value (of JSON's types) everywhere."""
        return value

    @contextmanager
    def leader_first(self, _name: str) -> Iterator[None]:
        """Enter the block when the leader has left it."""
        yield

    @contextmanager
    def node_leader_first(self, _name: str) -> Iterator[None]:
        """Enter the block when the first process on this node has left it: they share a disk."""
        yield

    def meet(self, name: str) -> None:
        """Return when all have come here."""

    def gather(self, _name: str, values: list[Any]) -> list[Any]:
        """Return the values of all, in the order of the ranks, to the leader; nothing to others."""
        return values

    def check_same(self, name: str, content: Mapping[str, str]) -> None:
        """Raise `PeersDiffer` where the content is not the leader's."""


class Together(Peers):
    """One of several processes. `alive` is called while it waits: its peers watch themselves, so waiting is no hang."""

    def __init__(self, place: Place, *, alive: Callable[[], None]) -> None:
        self.rank, self.world_size, self.local_rank = place.rank, place.world_size, place.local_rank
        self._place = place
        self._alive = alive
        self._chapter = ""
        self._store = _connect(place)

    def open_group(self, *, on_gpu: bool, timeout_seconds: float) -> None:
        """Make collectives possible."""
        self.meet("group")  # or the slowest to start would hold the others up where they hear no signal
        if on_gpu:
            torch.cuda.set_device(self.local_rank)
        with _lost_peers():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=timeout_seconds),
            )

    def begin_chapter(self, name: str) -> None:  # noqa: D102
        self._chapter = f"{name}/"

    def agree(self, wish: bool) -> bool:  # noqa: D102
        vote = torch.tensor([int(wish)])
        with _lost_peers():
            dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())

    def add_up(self, tensors: Sequence[Tensor]) -> None:  # noqa: D102
        # Buckets of one layout at every step: the order of summation does not depend on when a run was resumed.
        parts = in_parts(tensors)
        # One buffer for all: of several the allocator would keep each until the stream of the sums has left it.
        buffer = tensors[0].new_empty(max(sum(tensor.numel() for tensor in part) for part in parts))
        for part in parts:
            sizes = [tensor.numel() for tensor in part]
            flat = buffer[: sum(sizes)]
            torch.cat([tensor.reshape(-1) for tensor in part], out=flat)
            with _lost_peers():
                dist.all_reduce(flat)
            for tensor, summed in zip(part, flat.split(sizes), strict=True):
                tensor.copy_(summed.view(tensor.shape))

    def as_leader_says(self, name: str, value: Any) -> Any:  # noqa: D102
        if self.leads:
            self._tell(name, value)
            return value
        return self._hear(name)

    @contextmanager
    def leader_first(self, name: str) -> Iterator[None]:  # noqa: D102
        if not self.leads:
            self._hear(name)
        yield
        if self.leads:
            self._tell(name, None)

    @contextmanager
    def node_leader_first(self, name: str) -> Iterator[None]:  # noqa: D102
        name = f"{name}/node-{self._place.node}"
        if self.local_rank:
            self._hear(name)
        yield
        if not self.local_rank:
            self._tell(name, None)

    def meet(self, name: str) -> None:  # noqa: D102
        with _lost_peers():
            came = self._store.add(f"{self._chapter}{name}/came", 1)
        if came == self.world_size:
            self._tell(name, None)
        self._hear(name)

    def gather(self, name: str, values: list[Any]) -> list[Any]:  # noqa: D102
        self._tell(f"{name}/{self.rank}", values)
        if not self.leads:
            return []
        return [value for rank in range(self.world_size) for value in self._hear(f"{name}/{rank}", forget=True)]

    def check_same(self, name: str, content: Mapping[str, str]) -> None:  # noqa: D102
        leaders = self.as_leader_says(name, dict(content))
        if others := sorted(key for key in content if leaders.get(key) != content[key]):
            raise PeersDiffer(
                f"process {self.rank} begins with another {others[0]} than process 0: all nodes of a job need the same "
                "trainer image, and GPUs of one kind"
            )

    def say_goodbye(self) -> None:
        """Tell those who wait that nothing more is to be expected of this process, as far as they can be told."""
        try:
            self._store.set(GOODBYE, str(self.rank))
        except dist.DistError:
            return  # the store went with rank 0's pod, and whoever waits has noticed

    @contextmanager
    def spread_stop(self, *, requested: Callable[[], bool], request: Callable[[], None]) -> Iterator[None]:
        """Make a stop that one process hears of everybody's, wherever each of them is."""
        done = threading.Event()
        thread = threading.Thread(target=self._spread, args=(done, requested, request), name="stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _spread(self, done: threading.Event, requested: Callable[[], bool], request: Callable[[], None]) -> None:
        try:
            store = _connect(self._place)  # its own: a client answers one thread at a time
            ended = False
            while not ended:
                ended = done.wait(SPREAD_SECONDS)
                if requested():
                    store.set(STOP, str(self.rank))
                    return
                if not ended and store.check([STOP]):
                    request()
                    return
        except (PeerLost, dist.DistError):
            return  # the main thread notices as well, and says so

    def _tell(self, name: str, value: Any) -> None:
        """Put a value into the store: how many pieces follow the first, which comes last, and that one."""
        name, text = self._chapter + name, json.dumps(value)  # of ASCII only: a character is a byte
        first, *others = (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))
        with _lost_peers():
            for number, piece in enumerate(others, start=1):
                self._store.set(f"{name}/piece-{number}", piece)
            self._store.set(name, f"{len(others)} {first}")

    def _hear(self, name: str, *, forget: bool = False) -> Any:
        """Wait for a value. `forget` takes it out of the store, where nobody else asks for it: it lives in memory."""
        pause, name = FIRST_PAUSE_SECONDS, self._chapter + name
        while True:
            with _lost_peers():
                if self._store.check([name]):
                    return json.loads(self._taken(name, forget=forget))
                if self._store.check([GOODBYE]):
                    raise PeerLost(f"process {self._store.get(GOODBYE).decode()} has ended; its pod says why")
            self._alive()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _taken(self, name: str, *, forget: bool) -> str:
        count, _, first = self._store.get(name).decode().partition(" ")
        places = [f"{name}/piece-{number}" for number in range(1, int(count) + 1)]
        text = "".join([first, *(self._store.get(place).decode() for place in places)])
        for place in (name, *places) if forget else ():
            self._store.delete_key(place)
        return text


@contextmanager
def open_peers(place: Place, *, on_gpu: bool, timeout_seconds: float, alive: Callable[[], None]) -> Iterator[Together]:
    """Join the other processes; leave them in order, or say goodbye when it ends with an error."""
    peers = Together(place, alive=alive)
    try:
        peers.open_group(on_gpu=on_gpu, timeout_seconds=timeout_seconds)
        yield peers
    except Exception:
        peers.say_goodbye()
        raise
    dist.destroy_process_group()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors, by their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _connect(place: Place) -> Store:
    with _lost_peers():
        # The launcher of rank 0's pod listens already.
        timeout = timedelta(seconds=STORE_SECONDS)
        store = dist.TCPStore(place.host, place.port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        return PrefixStore("diffusion", store)


@contextmanager
def _lost_peers() -> Iterator[None]:
    """Raise what torch raises when others are gone as `PeerLost`: it knows RuntimeErrors only."""
    try:
        yield
    except RuntimeError as error:  # DistError is one, too
        if is_shortage(error) or "CUDA error" in str(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise PeerLost(f"the training processes lost each other: {first}") from error
