"""Bugs that other trainers had with several processes and memory. Each is planted here, and must be found."""

import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusion_api.validation import SamplePrompt
from diffusion_trainer import evaluation
from diffusion_trainer import peers as module
from diffusion_trainer.errors import PeerLost
from diffusion_trainer.evaluation import Evaluator
from diffusion_trainer.objective import DiscreteProcess
from diffusion_trainer.peers import Peers, Together
from diffusion_trainer.sampling import grid

PROMPTS = [SamplePrompt(prompt=f"picture {number}", seed=number) for number in range(5)]
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
            return b"0 null"

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
        evaluator.peers = Peers()
        Evaluator._draw(evaluator, 1)
        assert drawn_with[-1] == network.weight.data_ptr()

    check(SimpleNamespace(denoiser=network))
    with pytest.raises(AssertionError):
        check(SimpleNamespace(denoiser=copy.deepcopy(network)))


def test_the_node_stands_still_while_rank_0_draws_samples(monkeypatch):
    """In diffusers, ai-toolkit and SimpleTuner one GPU draws the pictures of all prompts, and the others wait."""
    seeds = []

    def draw(_family, wanted, **_):
        seeds.append([one.seed for one in wanted])
        return tuple(Image.new("RGB", (8, 8), (one.seed, 0, 0)) for one in wanted)

    monkeypatch.setattr(grid, "encoded", lambda _family, prompts, **_: [{}] * len(prompts))
    monkeypatch.setattr(grid, "draw", draw)
    family = SimpleNamespace(process=DiscreteProcess(torch.ones(1000), "Epsilon", {}))

    def shared(rank, of, sent):
        """Return what rank 0, which comes last, makes of what all have sent."""

        def gather(drawn):
            sent.extend(drawn)
            return [] if rank else sent

        return grid.sample_grid(family, PROMPTS, size=(8, 8), part=slice(rank, None, of), gather=gather)

    def planted(rank, _of, _sent):
        return None if rank else grid.sample_grid(family, PROMPTS, size=(8, 8))

    def check(way, of):
        seeds.clear()
        sent = []
        *others, made = [way(rank, of, sent) for rank in reversed(range(of))]
        assert others == [None] * (of - 1)
        assert made.grid_png() == alone
        assert max(len(drawn) for drawn in seeds) == -(-len(PROMPTS) // of)

    alone = grid.sample_grid(family, PROMPTS, size=(8, 8)).grid_png()
    for of in (1, 2, 3, 8):
        check(shared, of)
    with pytest.raises(AssertionError):
        check(planted, 2)


def test_an_evaluation_leaves_all_prompts_to_rank_0(monkeypatch):
    """The same bug, one floor up: the second of two processes draws its part, and sends it to where grids are made."""
    drawn, told = [], []

    def draw(_family, prompts, *, part, gather, **_):
        drawn.append([prompt.seed for prompt in prompts[part]])
        gather(drawn[-1])

    monkeypatch.setattr(evaluation, "sample_grid", draw)
    part = slice(1, None, 2)
    second = SimpleNamespace(leads=False, part=part, gather=lambda name, values: told.append((name, values)))
    spec = SimpleNamespace(validation=SimpleNamespace(prompts=PROMPTS), dataset=SimpleNamespace(resolution=8))
    courier = SimpleNamespace(send=lambda *_: pytest.fail("the leader alone sends grids"))
    evaluator = SimpleNamespace(
        spec=spec, family=None, attached=SimpleNamespace(text=None), courier=courier, peers=second
    )

    def planted(evaluator, step):
        return Evaluator._draw(evaluator, step) if evaluator.peers.leads else ()

    def check(way):
        drawn.clear()
        told.clear()
        assert way(evaluator, 3) == ()
        assert drawn == [[1, 3]]
        assert told == [("samples/3", [1, 3])]

    check(Evaluator._draw)
    with pytest.raises(AssertionError):
        check(planted)
