"""Properties of the plan, for any dataset."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.data.plan import Plan

SHAPES = ((64, 64), (80, 48), (48, 80))


def lock_of(buckets, held_out=()):
    images = tuple(
        LockedImage(
            id=f"{i:064x}",
            key=f"{i}.png",
            width=64,
            height=64,
            caption=str(i),
            bucket=SHAPES[bucket],
            split="validation" if i in held_out else "train",
        )
        for i, bucket in enumerate(buckets)
    )
    return DatasetLock(images, {}, {})


locks = st.lists(st.integers(0, 2), min_size=1, max_size=40).map(lock_of)


@settings(deadline=None)
@given(lock=locks, batch_size=st.integers(1, 12), seed=st.integers(0, 2**53), epoch=st.integers(0, 5))
def test_every_image_in_every_epoch_and_no_batch_mixes_buckets(lock, batch_size, seed, epoch):
    plan = Plan(lock, batch_size=batch_size, seed=seed, variants=2)
    first = epoch * plan.batches_per_epoch
    batches = [plan.batch(first + i) for i in range(plan.batches_per_epoch)]
    for i, batch in enumerate(batches):
        assert len(batch) == batch_size
        assert len({lock.images[slot.image].bucket for slot in batch}) == 1
        assert [slot.slot for slot in batch] == list(range(batch_size))
        assert {(slot.step, slot.epoch) for slot in batch} == {(first + i, epoch)}
    used = Counter(slot.image for batch in batches for slot in batch)
    assert set(used) == set(lock.training)


@settings(deadline=None)
@given(lock=locks, batch_size=st.integers(1, 12), seed=st.integers(0, 2**53))
def test_filling_up_is_fair(lock, batch_size, seed):
    """Within a bucket no image is used two times more than another, however small the bucket is."""
    plan = Plan(lock, batch_size=batch_size, seed=seed)
    used = Counter(slot.image for i in range(plan.batches_per_epoch) for slot in plan.batch(i))
    for shape in SHAPES:
        counts = [used[i] for i in lock.training if lock.images[i].bucket == shape]
        assert not counts or max(counts) - min(counts) <= 2


@settings(deadline=None)
@given(
    lock=locks,
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**53),
    steps=st.lists(st.integers(0, 300), min_size=1, max_size=10),
)
def test_a_batch_is_a_function_of_its_step_alone(lock, batch_size, seed, steps):
    asked_in_any_order = Plan(lock, batch_size=batch_size, seed=seed, variants=3, caption_dropout=0.5)
    for step in steps:
        fresh = Plan(lock, batch_size=batch_size, seed=seed, variants=3, caption_dropout=0.5)
        assert asked_in_any_order.batch(step) == fresh.batch(step)


def order(plan, epoch):
    first = epoch * plan.batches_per_epoch
    return [slot.image for i in range(plan.batches_per_epoch) for slot in plan.batch(first + i)]


def test_epochs_and_seeds_differ():
    lock = lock_of([0] * 30)
    plan = Plan(lock, batch_size=5, seed=1)
    assert order(plan, 0) != order(plan, 1)
    together = [{frozenset(s.image for s in plan.batch(6 * epoch + i)) for i in range(6)} for epoch in (0, 1)]
    assert together[0] != together[1], "the same images meet in every epoch"
    assert order(plan, 0) != order(Plan(lock, batch_size=5, seed=2), 0)
    assert order(plan, 0) != list(range(30))


def test_buckets_take_turns_in_no_fixed_order():
    lock = lock_of([0] * 20 + [1] * 20)
    plan = Plan(lock, batch_size=4, seed=1)
    shapes = [lock.images[plan.batch(i).__getitem__(0).image].bucket for i in range(10)]
    assert shapes not in (sorted(shapes), sorted(shapes, reverse=True))


def test_held_out_images_are_never_trained_on():
    plan = Plan(lock_of([0] * 10, held_out={2, 7}), batch_size=3, seed=0)
    used = {slot.image for step in range(50) for slot in plan.batch(step)}
    assert used == set(range(10)) - {2, 7}


def test_a_tail_is_filled_with_other_images_first():
    plan = Plan(lock_of([0] * 10), batch_size=4, seed=5)
    for step in range(60):
        assert len({slot.image for slot in plan.batch(step)}) == 4


def test_one_variant_for_each_image_and_epoch():
    lock = lock_of([0] * 5)
    plan = Plan(lock, batch_size=4, seed=0, variants=4)
    found = {}
    for step in range(200):
        for slot in plan.batch(step):
            assert found.setdefault((slot.epoch, slot.image), slot.variant) == slot.variant
    assert set(Counter(found.values())) == {0, 1, 2, 3}


@pytest.mark.parametrize(("probability", "low", "high"), [(0, 0, 0), (0.25, 0.2, 0.3), (1, 1, 1)])
def test_captions_are_dropped_as_often_as_they_should(probability, low, high):
    plan = Plan(lock_of([0] * 8), batch_size=4, seed=0, caption_dropout=probability)
    dropped = [slot.drop_caption for step in range(500) for slot in plan.batch(step)]
    assert low <= sum(dropped) / len(dropped) <= high


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"batch_size": 1, "variants": 0}])
def test_senseless_plans_are_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        Plan(lock_of([0]), seed=0, **bad)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="no image"):
        Plan(lock_of([0], held_out={0}), batch_size=1, seed=0)
    with pytest.raises(ValueError, match="negative"):
        Plan(lock_of([0]), batch_size=1, seed=0).batch(-1)
