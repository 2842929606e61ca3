"""The tensors of a step do not depend on who makes them, in what pieces, or what was made before."""

import numpy as np
import pytest
import torch

from diffusion_trainer.data import Plan, Share, open_loader
from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.objective import DiscreteObjective
from diffusion_trainer.rng import Purpose, stream

FIELDS = ("latents", "noise", "times", "text", "pooled", "geometry", "weights")
UNIFORM = DiscreteObjective.of(torch.linspace(0.999, 0.005, 1000), prediction="Epsilon", gamma=None)


class FakeCache:
    """Latents and texts that tell which they are."""

    def latents(self, image, variant):
        return torch.full((4, 8, 6), float(image)), torch.full((4, 8, 6), 0.5 + variant)

    def geometry(self, image, variant):
        return torch.tensor([64.0, 48.0, variant, image, 64.0, 48.0])

    def text(self, caption):
        return {"text": torch.full((77, 8), float(len(caption))), "pooled": torch.full((5,), float(len(caption)))}


def plan(batch_size=12, **options):
    images = tuple(
        LockedImage(f"{i:064x}", f"{i}.png", 48, 64, "c" * (i + 1), bucket=(48, 64), split="train") for i in range(20)
    )
    return Plan(DatasetLock(images, {}, {}), batch_size=batch_size, seed=7, variants=2, **options)


def steps(*, steps=range(4), share=None, workers=0, objective=UNIFORM, noise_offset=0.0):
    loader = open_loader(
        plan(caption_dropout=0.3),
        FakeCache(),
        steps=steps,
        share=share or Share(12),
        objective=objective,
        noise_offset=noise_offset,
        workers=workers,
    )
    return list(loader)


def part(batch, field):
    return batch.conditioning[field] if field in batch.conditioning else getattr(batch, field)


def whole(batches, field):
    return torch.cat([part(batch, field) for batch in batches])


def assert_equal(one, other):
    for field in FIELDS:
        for a, b in zip(one, other, strict=True):
            assert torch.equal(whole(a, field), whole(b, field)), field
    assert [[s for b in a for s in b.slots] for a in one] == [[s for b in a for s in b.slots] for a in other]


@pytest.mark.parametrize("micro", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_rank_world_and_micro_batch_change_nothing(micro, world):
    shares = [steps(share=Share(micro, rank=rank, world_size=world)) for rank in range(world)]
    together = [[batch for rank in shares for batch in rank[step]] for step in range(4)]
    assert_equal(together, steps())
    assert max(len(batch.slots) for step in together for batch in step) <= micro


def test_workers_change_nothing():
    assert_equal(steps(workers=2), steps())


def test_starting_late_changes_nothing():
    assert_equal(steps(steps=range(2, 4)), steps()[2:])


def test_steps_seeds_and_slots_differ():
    """The negative control of the tests above."""
    one, two = steps()[:2]
    assert not torch.equal(whole(one, "noise"), whole(two, "noise"))
    noise = whole(one, "noise")
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], whole(one, "latents")[0])


def test_batches_have_the_shapes_and_types_that_are_promised():
    (batch,) = steps(share=Share(12))[0]
    assert {field: part(batch, field).dtype for field in FIELDS} == {
        field: torch.int64 if field == "times" else torch.float32 for field in FIELDS
    }
    assert batch.latents.shape == batch.noise.shape == (12, 4, 8, 6)
    assert {name: rows.shape for name, rows in batch.conditioning.items()} == {"text": (12, 77, 8), "pooled": (12, 5)}
    assert batch.geometry.shape == (12, 6)
    assert batch.times.shape == batch.weights.shape == (12,)
    assert (batch.weights == 1).all()
    moved = batch.to("cpu")
    assert torch.equal(moved.noise, batch.noise)
    assert moved.conditioning.keys() == batch.conditioning.keys()
    assert moved.slots == batch.slots


def test_the_geometry_is_that_of_the_variant_whose_latents_are_used():
    (batch,) = steps()[0]
    assert batch.geometry.tolist() == [[64, 48, slot.variant, slot.image, 64, 48] for slot in batch.slots]
    assert len({slot.variant for slot in batch.slots}) == 2


def test_latents_are_drawn_from_the_posterior():
    """mean + std * eps, with eps from the stream of (step, slot); the cache has the scaling factor in both."""
    (batch,) = steps(steps=range(3, 4))[0]
    for i, slot in enumerate(batch.slots):
        eps = stream(7, Purpose.POSTERIOR, 3, i).standard_normal((4, 8, 6), dtype=np.float32)
        expected = float(slot.image) + np.float32(0.5 + slot.variant) * eps
        assert np.allclose(batch.latents[i].numpy(), expected, atol=1e-6)


def test_noise_belongs_to_step_and_slot():
    (batch,) = steps(steps=range(3, 4))[0]
    for i in range(12):
        eps = stream(7, Purpose.NOISE, 3, i).standard_normal((4, 8, 6), dtype=np.float32)
        assert np.array_equal(batch.noise[i].numpy(), eps)
        assert batch.times[i] == stream(7, Purpose.TIMESTEP, 3, i).integers(1000)


def test_captions_are_dropped_where_the_plan_says_so():
    (batch,) = steps()[0]
    assert any(slot.drop_caption for slot in batch.slots)
    for i, slot in enumerate(batch.slots):
        assert batch.conditioning["text"][i, 0, 0] == (0 if slot.drop_caption else slot.image + 1)


def test_noise_offset_adds_one_number_for_each_channel():
    plain = steps()
    offset = steps(noise_offset=0.1)
    added = whole(offset[0], "noise") - whole(plain[0], "noise")
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    assert added[:, :, 0, 0].unique().numel() > 40
    assert 0.05 < added.std() < 0.2
    assert torch.equal(whole(offset[0], "times"), whole(plain[0], "times"))


def test_timesteps_are_uniform_over_the_whole_range():
    drawn = torch.cat([whole(step, "times") for step in steps(steps=range(500))])
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    counts = torch.bincount(drawn // 100, minlength=10).float()
    assert (counts / counts.mean() - 1).abs().max() < 0.2


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ValueError, match="12 cannot be dealt out to 5"):
        steps(share=Share(2, world_size=5))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    steps()
    assert torch.equal(torch.get_rng_state(), before)
