import numpy as np
import pytest
import torch

from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.objective import DiscreteObjective, FlowObjective
from diffusion_trainer.rng import Purpose, stream
from diffusion_trainer.validation import BINS, validate

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
