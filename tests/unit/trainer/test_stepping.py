"""One step and what may go wrong in it: memory that is short, losses that are no numbers, several processes."""

import math
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from diffusion_api.memory_reference import spec_of
from diffusion_api.training import Ema, NonFinite, Training
from diffusion_trainer import fitting, stepping
from diffusion_trainer.data import Batch, Share
from diffusion_trainer.errors import Diverged, GpuOutOfMemory
from diffusion_trainer.guard import RollBack
from diffusion_trainer.optim import Group, lr_at
from diffusion_trainer.peers import Peers
from diffusion_trainer.state import made_trainable
from diffusion_trainer.stepping import Stepper, cut, fitting_share

CPU = torch.device("cpu")
IMAGES = 8


class FakePlan:
    """Batches of all images; every other one of larger pictures."""

    batches_per_epoch = 4
    lock = SimpleNamespace(
        images=[
            *(SimpleNamespace(key=f"{i}.png", bucket=(64, 64), role="instance") for i in range(IMAGES)),
            *(SimpleNamespace(key=f"{i}.png", bucket=(96, 96), role="instance") for i in range(IMAGES, 2 * IMAGES)),
            SimpleNamespace(key="class.png", bucket=(128, 128), role="class"),
        ],
        training=range(2 * IMAGES + 1),
    )

    def batch(self, step):
        return [SimpleNamespace(image=i + IMAGES * (step % 2)) for i in range(IMAGES)]


@dataclass
class FakeReady:
    """A model with one weight. A forward pass of more than `limit` images finds no memory."""

    limit: int = 99
    shortage: Exception | None = None
    nonfinite: NonFinite = field(default_factory=NonFinite)
    micro_batch: int = IMAGES

    def __post_init__(self):
        self.weight = torch.nn.Parameter(torch.tensor([0.5]))
        self.device = SimpleNamespace(torch=CPU, dtype=torch.float32)
        training = Training(ema=Ema(enabled=True), non_finite=self.nonfinite)
        self.trained = made_trainable([Group({"w": self.weight})], training, device=self.device)
        self.objective = SimpleNamespace(weights=torch.ones_like)
        self.extent = SimpleNamespace(batch_size=IMAGES, total_steps=100)
        self.share = Share(self.micro_batch)
        self.plan, self.cache, self.attached = FakePlan(), None, SimpleNamespace(modules=())
        self.seen = []

    def errors(self, batch):
        self.seen.append(len(batch.latents))
        if len(batch.latents) > self.limit:
            raise self.shortage or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return (batch.latents.flatten(1).mean(1) - self.weight).square()


class Fellow(Peers):
    """One of two processes, of which the other runs out of memory above a micro-batch, too."""

    world_size = 2

    def __init__(self, limit):
        self._limit = limit
        self.size = lambda: 0

    def agree(self, wish):
        return wish or self.size() > self._limit

    def add_up(self, tensors):
        for tensor in tensors:
            tensor.mul_(2)


def _batch(count=IMAGES, *, bad=()):
    """Return a batch in which some images, or all (True), have no finite loss."""
    latents = torch.arange(1.0, count + 1).view(-1, 1, 1, 1)
    if bad:
        latents[slice(None) if bad is True else list(bad)] = math.nan
    return Batch(
        latents, latents, torch.zeros(count), {}, torch.zeros(count, 6), torch.ones(count), tuple(range(count))
    )


def _stepper(ready, *, told=None, peers=None, **training):
    spec = spec_of("LoRA", 512, learningRate=0.1, batchSize=IMAGES, maxSteps=100, **training)
    told = [] if told is None else told
    return Stepper(spec, ready, peers=peers or Peers(), tell=lambda *news: told.append(news))


def test_batches_are_cut_with_everything_that_is_theirs():
    whole = _batch(5)
    pieces = cut([whole, _batch(1)], 2)
    assert [len(piece.latents) for piece in pieces] == [2, 2, 1, 1]
    assert [piece.slots for piece in pieces[:3]] == [(0, 1), (2, 3), (4,)]
    assert torch.equal(torch.cat([piece.weights for piece in pieces[:3]]), whole.weights)
    assert torch.equal(torch.cat([piece.geometry for piece in pieces[:3]]), whole.geometry)
    assert cut([whole], 5)[0] is whole


@pytest.mark.parametrize("limit", [8, 4, 3, 1])
def test_short_memory_costs_nothing_but_time(limit):
    enough, short, told = FakeReady(), FakeReady(limit=limit), []
    wanted = [_stepper(enough).take([_batch()], step) for step in range(1)]
    stepper = _stepper(short, told=told)
    found = [stepper.take([_batch()], step) for step in range(1)]
    torch.testing.assert_close(short.weight, enough.weight)
    torch.testing.assert_close(found[0].loss, wanted[0].loss)
    assert stepper.micro_batch_size == {8: 8, 4: 4, 3: 2, 1: 1}[limit]
    assert [size for _, size in told] == {8: [], 4: [4], 3: [4, 2], 1: [4, 2, 1]}[limit]
    short.seen.clear()
    stepper.take([_batch()], 1)
    assert set(short.seen) == {stepper.micro_batch_size}  # it stays as it was found


def test_shortage_that_cublas_reports_is_shortage_too():
    ready = FakeReady(limit=2, shortage=RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"))
    stepper = _stepper(ready)
    stepper.take([_batch()], 0)
    assert stepper.micro_batch_size == 2
    with pytest.raises(RuntimeError, match="launch failure"):
        _stepper(FakeReady(limit=2, shortage=RuntimeError("CUDA error: launch failure"))).take([_batch()], 0)


def test_a_failure_in_the_middle_leaves_no_gradients_behind():
    enough, short = FakeReady(micro_batch=4), FakeReady(micro_batch=4, limit=2)
    _stepper(enough).take(cut([_batch()], 4), 0)
    _stepper(short).take([_batch(2), *cut([_batch()], 4)][1:], 0)
    torch.testing.assert_close(short.weight, enough.weight)


def test_a_single_image_that_does_not_fit_ends_the_attempt():
    with pytest.raises(GpuOutOfMemory, match=r"single image.*dataset\.resolution.*gradientCheckpointing"):
        _stepper(FakeReady(limit=0)).take([_batch()], 0)


def test_all_processes_follow_the_one_with_the_least_memory():
    peers, told = Fellow(limit=2), []
    stepper = _stepper(FakeReady(), told=told, peers=peers)
    peers.size = lambda: stepper.micro_batch_size
    stepper.take([_batch(4)], 0)
    assert stepper.micro_batch_size == 2
    assert [size for _, size in told] == [4, 2]


def test_steps_without_numbers_are_skipped_until_they_are_too_many():
    ready = FakeReady(nonfinite=NonFinite(limit=2))
    stepper = _stepper(ready)
    stepper.take([_batch()], 0)
    before = ready.weight.detach().clone()
    stepper.take([_batch(bad=True)], 1)
    assert torch.equal(ready.weight, before)
    stepper.take([_batch()], 2)
    assert not torch.equal(ready.weight, before)
    for step in (3, 4, 5):
        stepper.take([_batch(bad=True)], step)
    with pytest.raises(Diverged, match=r"2 steps in a row.*up to step 5.*0\.1 at its peak.*no image of step 5"):
        stepper.take([_batch(bad=True)], 6)


@pytest.mark.parametrize(("micro_batch", "step"), [(IMAGES, 0), (3, 1)])
def test_the_images_that_are_named_are_those_without_numbers(micro_batch, step):
    stepper = _stepper(FakeReady(nonfinite=NonFinite(limit=1), micro_batch=micro_batch))
    stepper.take(cut([_batch(bad=[2, 5])], micro_batch), step)
    stepper.take([_batch()], step + 1)
    first = IMAGES * (step % 2)
    with pytest.raises(Diverged, match=rf"not finite in step {step + 1}: {first + 2}\.png, {first + 5}\.png$"):
        stepper.finish()


def test_the_images_of_other_processes_are_named_too():
    class Other(Fellow):
        """The other process has the first half of the batch, one image of which is bad."""

        rank = 1

        def add_up(self, tensors):
            tensors[-1][1] = math.inf

    ready = FakeReady(nonfinite=NonFinite(limit=1))
    stepper = _stepper(ready, peers=Other(limit=99))
    stepper.take([_batch(4, bad=[3])], 0)
    with pytest.raises(Diverged, match=r": 1\.png, 7\.png$"):
        stepper.finish()


def test_no_image_is_named_where_only_gradients_are_no_numbers():
    ready = FakeReady(nonfinite=NonFinite(limit=1))
    ready.weight.register_hook(lambda gradient: gradient * math.inf)
    stepper = _stepper(ready)
    assert math.isfinite(stepper.take([_batch()], 0).loss)
    with pytest.raises(Diverged, match=r"each image was finite in step 1, only the gradients were not") as caught:
        stepper.finish()
    assert ".png" not in str(caught.value)


def test_no_image_stands_out_where_all_of_them_lose_theirs():
    stepper = _stepper(FakeReady(nonfinite=NonFinite(limit=1)))
    stepper.take([_batch(bad=True)], 0)
    with pytest.raises(Diverged, match=r"no image of step 1 had a finite loss: 0\.png, .*, 3\.png and 4 more$"):
        stepper.finish()


def test_the_run_goes_back_where_the_policy_says_so_and_not_for_ever():
    ready = FakeReady(nonfinite=NonFinite(policy="RollBack", limit=1))
    stepper = _stepper(ready)
    for _ in range(3):
        stepper.take([_batch(bad=True)], 0)
        with pytest.raises(RollBack, match="1 step was skipped"):
            stepper.finish()
        ready.trained.guard.go_back()
    stepper.take([_batch(bad=True)], 0)
    with pytest.raises(Diverged):
        stepper.finish()


def test_the_last_steps_are_looked_at_in_the_end():
    stepper = _stepper(FakeReady(nonfinite=NonFinite(limit=1)))
    stepper.finish()
    stepper.take([_batch(bad=True)], 1)
    with pytest.raises(Diverged, match=r"1 step was skipped, up to step 2.*no image of step 2"):
        stepper.finish()


def test_the_learning_rate_is_halved_after_going_back():
    first, second = FakeReady(), FakeReady()
    second.trained.guard.go_back()
    rates = [_stepper(ready).take([_batch()], 3).learning_rate for ready in (first, second)]
    assert rates[1] == rates[0] / 2


def _of_accelerate(step, schedule, *, peak, total_steps, processes, accumulation):  # noqa: ARG001
    """AcceleratedScheduler advances once per process."""
    return lr_at(step * processes, schedule, peak=peak, total_steps=total_steps)


def _of_diffusers(step, schedule, *, peak, total_steps, processes, accumulation):  # noqa: ARG001
    """The SDXL scripts count micro-batches, where the scheduler counts updates."""
    longer = schedule.model_copy(update={"warmup_steps": schedule.warmup_steps * accumulation})
    return lr_at(step, longer, peak=peak, total_steps=total_steps * accumulation)


def _of_sd_scripts(step, schedule, *, peak, total_steps, processes, accumulation):  # noqa: ARG001
    """`get_scheduler_fix` multiplies the training steps by the processes, and not the warm-up."""
    return lr_at(step, schedule, peak=peak, total_steps=total_steps * processes)


@pytest.mark.parametrize("name", ["Cosine", "Linear", "CosineWithRestarts", "WarmupStableDecay"])
def test_diffusers_9633_the_schedule_counts_processes_or_micro_batches(monkeypatch, name):
    def curve(processes, micro_batch, planted):
        accumulation = IMAGES // processes // micro_batch
        ready = FakeReady(micro_batch=micro_batch)
        peers = Fellow(limit=99) if processes == 2 else Peers()
        stepper = _stepper(ready, peers=peers, lrSchedule={"name": name, "warmupSteps": 10})
        batches = cut([_batch(IMAGES // processes)], micro_batch)
        with monkeypatch.context() as there:
            if planted:
                rule = partial(planted, processes=processes, accumulation=accumulation)
                there.setattr(stepping.optim, "lr_at", rule)
            return [stepper.take(batches, step).learning_rate for step in range(0, 100, 7)]

    def check(planted=None):
        curves = [curve(*shape, planted) for shape in [(1, 8), (1, 2), (2, 4), (2, 1)]]
        assert all(found == curves[0] for found in curves)
        assert len(set(curves[0])) > 2

    check()
    for planted in (_of_accelerate, _of_diffusers, _of_sd_scripts):
        with pytest.raises(AssertionError):
            check(planted)


def test_a_process_that_mends_its_lack_of_memory_alone_leaves_the_others_behind():
    """Caught where it occurs, the error leaves processes with different numbers of micro-batches."""

    class Alone(Fellow):
        def agree(self, wish):
            return wish

    def check(kind):
        peers = kind(limit=2)
        stepper = _stepper(FakeReady(), peers=peers)
        peers.size = lambda: stepper.micro_batch_size
        stepper.take([_batch(4)], 0)
        assert stepper.micro_batch_size == 2  # what the other process has room for

    check(Fellow)
    with pytest.raises(AssertionError):
        check(Alone)


def test_one_step_without_numbers_ruins_the_weights_of_peers(monkeypatch):
    def check():
        ready = FakeReady()
        stepper = _stepper(ready)
        for step, bad in enumerate([False, True, False]):
            stepper.take([_batch(bad=bad)], step)
        assert ready.weight.isfinite().all()

    check()
    monkeypatch.setattr("diffusion_trainer.optim.update._step_unless", lambda _, optimizer: optimizer.step())
    with pytest.raises(AssertionError):
        check()


def test_the_average_follows_every_step():
    ready = FakeReady()
    start = ready.weight.detach().clone()
    _stepper(ready).take([_batch()], 0)
    decay = 1 - 2**-0.75
    wanted = decay * start + (1 - decay) * ready.weight.detach()
    torch.testing.assert_close(ready.trained.average.tensors()["w"], wanted)


# --- what fits, before the first step ---


@pytest.fixture
def loaded(monkeypatch):
    """The steps that were loaded for a trial, with their shares."""
    found = []

    def open_loader(_plan, _cache, *, steps, share, objective):
        assert objective
        found.append((steps[0], share))
        yield cut([_batch(IMAGES // share.world_size)], share.micro_batch_size)

    monkeypatch.setattr(stepping.data, "open_loader", open_loader)
    monkeypatch.setattr(fitting, "is_limited", lambda _: True)
    return found


@pytest.mark.parametrize(("limit", "size", "tries"), [(99, 8, 1), (4, 4, 2), (3, 2, 3), (1, 1, 4)])
def test_the_largest_micro_batch_is_found_with_the_largest_pictures(loaded, limit, size, tries):
    ready = FakeReady(limit=limit)
    before = ready.weight.detach().clone()
    found = fitting_share(spec_of("LoRA", 512, batchSize=IMAGES), ready, Peers())
    assert found.micro_batch_size == size
    assert [step for step, _ in loaded] == [1] * tries  # the first with pictures of 96 x 96
    assert ready.weight.grad is None
    assert torch.equal(ready.weight, before)
    assert not ready.trained.optimizer.state


def test_a_micro_batch_that_the_user_set_is_not_tried(loaded):
    ready = FakeReady(limit=1)
    assert fitting_share(spec_of("LoRA", 512, batchSize=IMAGES, microBatchSize=4), ready, Peers()) is ready.share
    assert loaded == []


def test_where_no_image_fits_activations_are_recomputed(loaded, monkeypatch):
    ready, switched = FakeReady(limit=0), []

    def recompute(_modules, *, on):
        switched.append(on)
        ready.limit = 2

    monkeypatch.setattr(fitting, "set_recomputing", recompute)
    found = fitting_share(spec_of("LoRA", 512, batchSize=IMAGES), ready, Peers())
    assert (found.micro_batch_size, switched) == (2, [True])
    ready.limit = 0
    spec = spec_of("LoRA", 512, batchSize=IMAGES, gradientCheckpointing="Never")
    with pytest.raises(GpuOutOfMemory, match="single image"):
        fitting_share(spec, ready, Peers())
    assert len(loaded) == 4 + 3 + 4
