from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.objective import DiscreteObjective, FlowObjective
from diffusion_trainer.rng import Purpose, stream
from diffusion_trainer.validation import BINS, MEASURED, measured, train_subset, validate

ALPHAS = torch.linspace(0.999, 0.005, 1000)
OBJECTIVE = DiscreteObjective.of(ALPHAS, prediction="Epsilon", gamma=None)
TIMESTEPS = (62, 187, 312, 437, 562, 687, 812, 937)


class FakeCache:
    def latents(self, image, variant):
        assert variant == 0
        shape = (4, 8, 6) if image % 2 else (4, 6, 8)
        return torch.full(shape, image / 10), torch.full(shape, 1e9)

    def geometry(self, image, variant):
        assert variant == 0
        return torch.full((6,), float(image))

    def text(self, caption):
        return {"text": torch.full((77, 8), float(len(caption)))}


def lock(count=7, *, trained=3, reverse=False):
    held_out = [
        LockedImage(f"{i:064x}", f"{i}", 64, 64, "c" * (i + 1), (48, 64) if i % 2 else (64, 48), "validation")
        for i in range(count)
    ]
    training = [LockedImage(f"{100 + i:064x}", f"t{i}", 64, 64, "t", (48, 64), "train") for i in range(trained)]
    return DatasetLock(tuple(held_out[::-1] if reverse else held_out) + tuple(training), {}, {})


def loss(batch):
    """Whatever: a function of everything that a denoiser sees, of each image alone."""
    a = ALPHAS[batch.times].view(-1, 1, 1, 1)
    noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * batch.noise
    return (
        (noisy - batch.noise + batch.conditioning["text"].mean((1, 2)).view(-1, 1, 1, 1) / 100).square().mean((1, 2, 3))
    )


def result(lock=lock(), *, seed=1, batch_size=4, loss=loss):  # noqa: B008 - immutable
    return validate(lock, FakeCache(), loss, objective=OBJECTIVE, seed=seed, batch_size=batch_size, device="cpu")


def test_times_are_the_middles_of_the_eighths():
    seen = {}

    def watching(batch):
        seen.setdefault(batch.times.dtype, set()).update(batch.times.tolist())
        return torch.zeros(len(batch.times))

    result(loss=watching)
    validate(lock(), FakeCache(), watching, objective=FlowObjective(shift=3), seed=1, batch_size=4, device="cpu")
    assert seen == {torch.int64: set(TIMESTEPS), torch.float32: {(2 * i + 1) / 16 for i in range(BINS)}}


def test_the_result_is_the_same_each_time_and_independent_of_the_batch_size():
    assert result() == result()
    for batch_size in (1, 3, 8, 64):
        other = result(batch_size=batch_size)
        assert other.by_bin == pytest.approx(result().by_bin, rel=1e-6)
        assert other.loss == pytest.approx(result().loss, rel=1e-6)
        assert other.images == 7


def test_seeds_differ_and_bins_differ():
    assert result(seed=2).loss != result().loss
    assert len(set(result().by_bin)) == BINS


def test_it_is_the_mean_of_the_loss_with_the_noise_of_each_image():
    """Computed here image by image, without the room's batches."""
    wanted = np.zeros(BINS)
    for i in range(7):
        for number in range(BINS):
            shape = (4, 8, 6) if i % 2 else (4, 6, 8)
            noise = stream(1, Purpose.VALIDATION, f"{i:064x}", number).standard_normal(shape, dtype=np.float32)
            a = float(ALPHAS[TIMESTEPS[number]])
            error = a**0.5 * i / 10 + ((1 - a) ** 0.5 - 1) * noise + (i + 1) / 100
            wanted[number] += (error**2).mean() / 7
    assert result().by_bin == pytest.approx(wanted, rel=1e-5)
    assert result().loss == pytest.approx(wanted.mean(), rel=1e-5)


def test_noise_belongs_to_the_image_not_to_its_place():
    class ByCaption(FakeCache):
        def latents(self, image, variant):
            return super().latents(6 - image, variant)

    reverse = validate(lock(reverse=True), ByCaption(), loss, objective=OBJECTIVE, seed=1, batch_size=4, device="cpu")
    assert reverse == result()


def test_batches_have_one_size_and_no_gradients():
    seen = set()

    def watching(batch):
        assert not torch.is_grad_enabled()
        seen.add(tuple(batch.latents.shape))
        return loss(batch)

    result(loss=watching, batch_size=5)
    assert seen == {(5, 4, 8, 6), (5, 4, 6, 8)}


@pytest.mark.parametrize("processes", [2, 3, 20])
def test_several_processes_find_what_one_finds(processes):
    """Bit for bit; the last of 20 has nothing to do."""
    pool = []

    def gather(losses):
        pool.extend(losses)
        return pool if len(pool) == 7 * BINS else []

    found = [
        validate(
            lock(), FakeCache(), loss, objective=OBJECTIVE, seed=1, batch_size=4, device="cpu",
            part=slice(rank, None, processes), gather=gather,
        )
        for rank in range(processes)
    ]  # fmt: skip
    assert next(one for one in found if one is not None) == result()
    assert found[0] is None


def test_without_a_held_out_split_there_is_no_result():
    assert result(lock(0)) is None


def gap(lock, *, seed=1, beside=None, **options):
    beside = train_subset(lock, seed=seed) if beside is None else beside
    return validate(
        lock, FakeCache(), loss, objective=OBJECTIVE, seed=seed, batch_size=4, device="cpu", beside=beside, **options
    )


def test_training_images_are_measured_in_the_same_way_and_change_nothing():
    both = gap(lock(trained=9))
    assert (both.images, both.trained.images) == (7, 7)
    alone = result(lock(trained=9))
    assert (both.loss, both.by_bin, both.of_images) == (alone.loss, alone.by_bin, alone.of_images)
    assert sum(both.of_images) / 7 == pytest.approx(both.loss, rel=1e-12)
    assert both.trained.loss != both.loss


def test_an_image_on_the_other_side_has_the_loss_that_it_would_have_here():
    """The gap compares like with like: times and noise belong to the image, not to its split."""
    swapped = DatasetLock(
        tuple(replace(one, split="train" if one.split == "validation" else "validation") for one in lock().images),
        {},
        {},
    )
    assert gap(swapped, beside=range(7)).trained.of_images == result().of_images


def test_the_subset_is_as_large_as_the_held_out_split_fixed_and_of_training_images():
    many = lock(trained=50)
    chosen = train_subset(many, seed=1)
    assert len(chosen) == 7
    assert set(chosen) <= set(many.training)
    assert chosen == train_subset(many, seed=1)
    assert chosen != train_subset(many, seed=2)
    assert len(train_subset(lock(trained=3), seed=1)) == 3
    more = DatasetLock((*many.images, replace(many.images[-1], id="f" * 64)), {}, {})
    assert len(set(train_subset(more, seed=1)) & set(chosen)) >= 6  # an image more hardly changes it


def test_an_evaluation_costs_the_same_however_many_images_are_held_out():
    """FineTune's default between two evaluations is 250 steps of 16 images, three forward passes each with backward."""
    passes = []

    def counting(batch):
        passes.append(len(batch.times))
        return loss(batch)

    many = lock(300, trained=300)
    beside = train_subset(many, seed=1)
    found = validate(
        many, FakeCache(), counting, objective=OBJECTIVE, seed=1, batch_size=4, device="cpu", beside=beside
    )
    assert (found.images, found.trained.images) == (MEASURED, MEASURED)
    assert sum(passes) <= 0.03 * 250 * 16 * 3
    assert (gap(many, most=20).images, gap(many, beside=train_subset(many, seed=1, most=20)).trained.images) == (20, 20)


def test_what_is_measured_is_a_function_of_the_contents():
    many = lock(300)
    chosen = measured(many, most=16)
    assert {many.images[i].id for i in chosen} == {f"{i:064x}" for i in range(16)}  # the first by content hash
    backwards = lock(300, reverse=True)
    assert {backwards.images[i].id for i in measured(backwards, most=16)} == {many.images[i].id for i in chosen}
    assert measured(lock(7), most=16) == tuple(range(7))
    assert set(measured(many, most=8)) < set(chosen)
    few = DatasetLock(tuple(many.images[i] for i in chosen), {}, {})
    assert result(many).by_bin == result(few).by_bin


def test_class_images_are_no_training_images_of_ones_own():
    classes = DatasetLock(tuple(replace(one, role="class") for one in lock().images if one.split == "train"), {}, {})
    assert train_subset(DatasetLock((*lock(trained=0).images, *classes.images), {}, {}), seed=1) == ()


def test_several_processes_find_the_same_gap():
    pool = []

    def gather(losses):
        pool.extend(losses)
        return pool if len(pool) == 2 * 7 * BINS else []

    many = lock(trained=9)
    found = [gap(many, part=slice(rank, None, 3), gather=gather) for rank in range(3)]
    assert next(one for one in found if one is not None) == gap(many)


def test_nothing_held_out_nothing_measured():
    assert gap(lock(0), beside=(0, 1)) is None
