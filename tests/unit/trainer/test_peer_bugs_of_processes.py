"""Bugs that other trainers had with several processes and memory. Each is planted here, and must be found."""

import copy
from types import SimpleNamespace

import pytest
import torch

from diffusion_trainer import evaluation
from diffusion_trainer import peers as module
from diffusion_trainer.errors import PeerLost
from diffusion_trainer.evaluation import Evaluator
from diffusion_trainer.peers import Together

TIMEOUT_SECONDS = 1800.0
"""Of the collective in that issue."""


def together(store=None, alive=lambda: None):
    """Return the second of two processes, without the other."""
    peers = Together.__new__(Together)
    peers.rank, peers.world_size, peers._chapter = 1, 2, ""
    peers._store, peers._alive = store, alive
    return peers


def test_sd_scripts_has_one_collective_for_each_parameter(monkeypatch):
    """Its network scripts reduced gradients one by one: hundreds of small messages in each step."""
    calls = []

    def doubled(tensor):
        calls.append(tensor.numel())
        tensor *= 2

    monkeypatch.setattr(module.dist, "all_reduce", doubled)

    def one_by_one(tensors):
        for tensor in tensors:
            module.dist.all_reduce(tensor)

    def check(add_up):
        calls.clear()
        found = [torch.full((2, 3), float(number)) for number in range(50)]
        add_up(found)
        assert [float(tensor[0, 0]) for tensor in found] == [2.0 * number for number in range(50)]
        assert calls == [50 * 6]

    check(together().add_up)
    with pytest.raises(AssertionError):
        check(one_by_one)


def test_sd_scripts_971_the_others_time_out_while_rank_0_is_busy(monkeypatch):
    """Rank 0 encodes the dataset, while the others stand in a collective, which gives up after half an hour."""
    clock, signs = [0.0], []

    def collective(_tensor, **_options):
        if clock[0] + TIMEOUT_SECONDS < 3600:
            raise RuntimeError("Watchdog caught collective operation timeout")

    class BusyForAnHour:
        def check(self, names):
            return names == ["encoding"] and clock[0] >= 3600

        def get(self, _name):
            return "null"

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module.dist, "all_reduce", collective)

    def ours():
        with together(BusyForAnHour(), alive=lambda: signs.append(clock[0])).leader_first("encoding"):
            pass

    def planted():
        together().agree(wish=False)

    def check(wait):
        clock[0] = 0.0
        signs.clear()
        try:
            wait()
        except PeerLost:
            clock[0] = 0.0
        assert clock[0] >= 3600

    check(ours)
    assert len(signs) > 3600  # and nobody takes it for a hang
    with pytest.raises(AssertionError):
        check(planted)


def test_diffusers_9546_a_second_model_is_loaded_for_the_pictures(monkeypatch):
    """Its scripts make a pipeline for validation beside the model that is trained, and run out of memory there."""
    network, drawn_with = torch.nn.Linear(2, 2), []

    def draw(family, _prompts, **_options):
        drawn_with.append(family.denoiser.weight.data_ptr())
        return SimpleNamespace(grid_png=lambda: b"", pictures=())

    monkeypatch.setattr(evaluation, "sample_grid", draw)

    def check(family):
        spec = SimpleNamespace(validation=SimpleNamespace(prompts=("a",)), dataset=SimpleNamespace(resolution=64))
        courier = SimpleNamespace(send=lambda *_: None)
        evaluator = SimpleNamespace(spec=spec, family=family, attached=SimpleNamespace(text=None), courier=courier)
        Evaluator._draw(evaluator, 1)
        assert drawn_with[-1] == network.weight.data_ptr()

    check(SimpleNamespace(denoiser=network))
    with pytest.raises(AssertionError):
        check(SimpleNamespace(denoiser=copy.deepcopy(network)))
