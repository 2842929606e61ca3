"""The one sum per step, in buckets that bound its memory, and what goes through the store, in pieces that it takes."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from diffusion_trainer import fitting
from diffusion_trainer import peers as module
from diffusion_trainer.device import gpu_errors
from diffusion_trainer.errors import GpuOutOfMemory, PeerLost
from diffusion_trainer.peers import Together

FULL = "NCCL error in: ProcessGroupNCCL.cpp:1, ncclUnhandledCudaError\nLast error:\nCuda failure 2 'out of memory'"


@pytest.fixture
def two():
    """Return one of two processes, without the other."""
    peers = Together.__new__(Together)
    peers.rank, peers.world_size = 0, 2
    return peers


@pytest.fixture
def sums(monkeypatch):
    """Double what is summed, and keep the sizes of the sums, and where they were made."""
    found = []

    def all_reduce(tensor):
        found.append((tensor.numel(), tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        tensor *= 2

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    return found


def gradients():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (5,), (4, 4), (2, 3, 2, 2), (1,), ()]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    found[3] = found[3].to(memory_format=torch.channels_last)
    return found


@pytest.mark.parametrize(
    ("floats", "sizes"),
    [(1000, [53]), (20, [11, 16, 24, 2]), (1, [6, 5, 16, 24, 1, 1]), (27, [27, 26])],
)
def test_sums_take_no_more_than_one_bucket(monkeypatch, two, sums, floats, sizes):
    """The whole of SDXL would take 10 GB beside its gradients, which nothing has counted."""
    monkeypatch.setattr(fitting, "PART_BYTES", 4 * floats)
    tensors = gradients()
    places = [tensor.data_ptr() for tensor in tensors]
    two.add_up(tensors)
    assert [size for size, *_ in sums] == sizes
    assert len({place for _, place, _ in sums}) == 1  # one buffer, for a stream may still read the one before
    assert {nbytes for *_, nbytes in sums} == {4 * max(sizes)}
    assert [tensor.data_ptr() for tensor in tensors] == places
    for tensor, before in zip(tensors, gradients(), strict=True):
        assert torch.equal(tensor, 2 * before)


@pytest.mark.parametrize(("text", "error"), [(FULL, GpuOutOfMemory), ("Connection closed by peer", PeerLost)])
def test_a_sum_that_finds_no_memory_is_no_loss_of_the_others(monkeypatch, two, text, error):
    def all_reduce(_):
        raise RuntimeError(text)

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    with pytest.raises(error), gpu_errors():
        two.add_up([torch.ones(2)])


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def of_two(rank, store):
    peers = Together.__new__(Together)
    peers.rank, peers.world_size, peers._chapter = rank, 2, ""
    peers._store, peers._alive = dist.PrefixStore("run", store), lambda: None
    return peers


@pytest.mark.parametrize("length", [0, 5, 9 << 20])  # the store hangs up on whoever sends more than 8 MiB
def test_what_is_gathered_may_be_large_and_does_not_stay(store, length):
    """Pictures of 2048 px, at every evaluation: rank 0's pod would fill up with those of all."""
    before = store.num_keys()
    said = [["ä" * min(length, 3), "x" * length], ["y", None]]
    assert of_two(1, store).gather("samples/1", [said[1]]) == []
    assert store.num_keys() > before
    assert of_two(0, store).gather("samples/1", [said[0]]) == said
    assert store.num_keys() == before


def test_what_the_leader_says_is_heard_by_all(store):
    leader, others = of_two(0, store), [of_two(1, store), of_two(1, store)]
    said = {"losses": list(range(1_000_000))}
    assert leader.as_leader_says("evaluated/1", said) == said
    assert [other.as_leader_says("evaluated/1", None) for other in others] == [said, said]
