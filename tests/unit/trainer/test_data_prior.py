"""DreamBooth: which class images go with which instance images, and what their losses weigh."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_trainer.data import DatasetLock, LockedImage, Plan

SHAPES = ((64, 64), (80, 48))


def lock_of(instance, classes):
    """`instance` and `classes`: images of each shape."""
    images = []
    for role, counts in (("instance", instance), ("class", classes)):
        for shape, count in zip(SHAPES, counts, strict=True):
            images += [
                LockedImage(f"{role}{shape}{i}", "k", 64, 64, role, shape, "train", concept=role == "class", role=role)
                for i in range(count)
            ]
    return DatasetLock(tuple(images), {}, {})


@settings(deadline=None, max_examples=60)
@given(
    instance=st.tuples(st.integers(1, 9), st.integers(0, 9)),
    classes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    half=st.integers(1, 4),
    step=st.integers(0, 50),
)
def test_every_batch_has_as_many_class_as_instance_images(instance, classes, half, step):
    lock = lock_of(instance, classes)
    batch = Plan(lock, batch_size=2 * half, seed=3).batch(step)
    assert [lock.images[slot.image].role for slot in batch] == ["instance", "class"] * half
    assert len({lock.images[slot.image].bucket for slot in batch}) == 1
    assert [slot.caption for slot in batch] == ["instance", "class"] * half


def test_an_epoch_is_one_of_the_instance_images_and_class_images_take_turns():
    lock = lock_of((6, 0), (4, 1))
    plan = Plan(lock, batch_size=4, seed=1)
    assert plan.batches_per_epoch == 3
    used = Counter(slot.image for step in range(12) for slot in plan.batch(step))
    assert {used[i] for i in range(6)} == {4}  # four epochs
    assert {used[i] for i in range(6, 10)} == {6}  # 24 slots for four images
    assert used[10] == 0  # there is no instance image of its shape


def test_class_images_come_in_another_order_in_each_round():
    plan = Plan(lock_of((8, 0), (8, 1)), batch_size=2, seed=1)
    rounds = [[plan.batch(step)[1].image for step in range(8 * n, 8 * n + 8)] for n in range(3)]
    # The order of batches differs from epoch to epoch as well; what matters is who goes with whom.
    assert len({tuple(one) for one in rounds}) == 3
    assert all(sorted(one) == sorted(rounds[0]) for one in rounds)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_loss_is_mean_instance_plus_weight_times_mean_class(weight):
    """By hand, for losses 1, 3 of instance and 10, 30 of class images: 2 + weight x 20."""
    batch = Plan(lock_of((2, 0), (2, 1)), batch_size=4, seed=1, prior_loss_weight=weight).batch(0)
    weights = torch.tensor([slot.weight for slot in batch])
    assert weights.tolist() == [2, 2 * weight, 2, 2 * weight]
    losses = torch.tensor([1.0, 10.0, 3.0, 30.0])
    assert float((weights * losses).sum() / 4) == 2 + weight * 20  # the trainer divides by the batch


def test_without_class_images_everything_weighs_one():
    lock = lock_of((5, 0), (0, 0))
    batch = Plan(lock, batch_size=3, seed=1, prior_loss_weight=7).batch(0)
    assert [slot.weight for slot in batch] == [1, 1, 1]


def test_odd_batches_and_shapes_without_class_images_are_refused():
    with pytest.raises(ValueError, match="even"):
        Plan(lock_of((2, 0), (2, 1)), batch_size=3, seed=1)
    with pytest.raises(ValueError, match="bucket"):
        Plan(lock_of((2, 2), (2, 0)), batch_size=2, seed=1)
