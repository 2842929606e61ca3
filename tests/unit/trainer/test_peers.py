"""The one sum per step: in buckets that bound its memory, in place, and with errors that say what happened."""

import pytest
import torch

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
