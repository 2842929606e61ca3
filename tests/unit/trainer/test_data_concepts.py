"""Several concepts, their weights, captions and splits; sharpness; shuffled tags."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from diffusion_api.dataset import Captions, Dataset
from diffusion_api.job import TrainerSpec
from diffusion_trainer.data import DatasetLock, LockedImage, Pictures, Plan, folders_of, freeze
from diffusion_trainer.data.captions import CaptionVariants
from diffusion_trainer.data.freezing import split
from diffusion_trainer.data.sharpness import sharpness
from diffusion_trainer.data.survey import survey
from diffusion_trainer.errors import BadData
from diffusion_trainer.objectstore import open_store
from diffusion_trainer.preparation import plan_of
from testkit.tiny import make_image_folder


def spec_of(dataset, **sections):
    return TrainerSpec.model_validate(
        {
            "method": "LoRA",
            "model": {"source": "file:///model/"},
            "output": {"destination": "file:///out/"},
            "dataset": {"resolution": 64, "buckets": {"step": 8}, "filters": {"minSide": 16}, **dataset},
            **sections,
        }
    )


def folders(spec):
    return folders_of(spec, [open_store(source) for source in spec.dataset.sources])


def frozen(spec, tmp_path):
    return freeze(spec.dataset, folders(spec), seed=1, batch_size=1, work=tmp_path / "work", report=lambda _: None)


@pytest.fixture
def concepts(tmp_path):
    """Dogs without captions, cats with them, and their concepts in the job's words."""
    make_image_folder(tmp_path / "dogs", 4, captions="None", seed=1)
    make_image_folder(tmp_path / "cats", 6, seed=2)
    return [
        {"source": (tmp_path / "dogs").as_uri(), "prompt": "a photo of sks dog", "weight": 2.5},
        {"source": (tmp_path / "cats").as_uri()},
    ]


def test_each_concept_has_its_folder_prompt_and_weight(tmp_path, concepts):
    lock = frozen(spec_of({"concepts": concepts, "captions": {"prefix": "x "}}), tmp_path)
    assert Counter((one.concept, one.weight) for one in lock.images) == {(0, 2.5): 4, (1, 1.0): 6}
    assert {one.caption for one in lock.images if one.concept == 0} == {"x a photo of sks dog"}
    assert {one.caption for one in lock.images if one.concept == 1} == {f"x picture {i} of a thing" for i in range(6)}
    assert DatasetLock.from_json(lock.to_json()) == lock


def test_a_concepts_pictures_come_from_its_own_folder(tmp_path, concepts):
    spec = spec_of({"concepts": concepts})
    lock = frozen(spec, tmp_path)
    pictures = Pictures([folder.store for folder in folders(spec)], tmp_path / "other")
    first = {one.concept: one for one in lock.images if one.key == "000.png"}
    for name, concept in (("dogs", 0), ("cats", 1)):
        assert pictures.path(first[concept]).read_bytes() == (tmp_path / name / "000.png").read_bytes()


def test_a_concept_without_captions_or_images_is_named(tmp_path, concepts):
    del concepts[0]["prompt"]
    with pytest.raises(BadData, match=r"dataset.concepts\[0\].source file.*4 of 4 .*or the concept's prompt"):
        frozen(spec_of({"concepts": concepts}), tmp_path)
    with pytest.raises(BadData, match=r"concepts\[0\]"):
        survey(spec_of({"concepts": concepts}).dataset, folders(spec_of({"concepts": concepts})), work=tmp_path / "w")
    whole = spec_of({"concepts": concepts, "captions": {"default": "a dog"}})
    assert {one.caption for one in frozen(whole, tmp_path).images if one.concept == 0} == {"a dog"}
    make_image_folder(tmp_path / "tiny", 2, sizes=((8, 8),))
    small = [*concepts[1:], {"source": (tmp_path / "tiny").as_uri()}]
    with pytest.raises(BadData, match=r"dataset.concepts\[1\].source .*no image is left"):
        frozen(spec_of({"concepts": small}), tmp_path)


def test_the_preflight_sees_all_concepts(tmp_path, concepts):
    spec = spec_of({"concepts": concepts})
    seen = survey(spec.dataset, folders(spec), work=tmp_path / "w")
    assert (seen.images, seen.sampled, seen.complete) == (10, 8, True)


def test_an_image_of_two_concepts_belongs_to_the_first(tmp_path, concepts):
    (tmp_path / "cats" / "000.png").write_bytes((tmp_path / "dogs" / "000.png").read_bytes())
    lock = frozen(spec_of({"concepts": concepts}), tmp_path)
    assert lock.rejected["duplicate"] == (f"{(tmp_path / 'cats').as_uri()}/000.png",)
    assert lock.rejected_counts == {"duplicate": 1}


def test_every_concept_gives_its_share_of_the_held_out_images():
    members = [[f"a{i}" for i in range(40)], [f"b{i}" for i in range(10)], ["c0", "c1"]]
    sides = split(members, 0.1, seed=1)
    assert Counter(name[0] for name, side in sides.items() if side == "validation") == {"a": 4, "b": 1}
    few = split([["a0", "a1"], ["b0", "b1", "b2"]], 0.05, seed=1)
    assert Counter(name[0] for name, side in few.items() if side == "validation") == {"b": 1}


def lock_of(*concepts):
    """Concepts as (images, weight), in one bucket."""
    images = [
        LockedImage(f"{number}-{i:03d}", "k", 64, 64, "c", (64, 64), "train", concept=number, weight=weight)
        for number, (count, weight) in enumerate(concepts)
        for i in range(count)
    ]
    return DatasetLock(tuple(images), {}, {})


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 8)), min_size=1, max_size=3),
    batch_size=st.integers(1, 6),
    epoch=st.integers(0, 4),
)
def test_weights_never_leave_an_image_out_and_epochs_have_one_length(sizes, batch_size, epoch):
    lock = lock_of(*sizes)
    plan = Plan(lock, batch_size=batch_size, seed=7)
    first = epoch * plan.batches_per_epoch
    batches = [plan.batch(first + i) for i in range(plan.batches_per_epoch)]
    assert {slot.image for batch in batches for slot in batch} == set(range(len(lock.images)))
    assert {slot.epoch for batch in batches for slot in batch} == {epoch}
    assert {len(batch) for batch in batches} == {batch_size}


def test_draws_are_proportional_to_weights_over_the_epochs():
    """40 images at 2.5 and 60 at 1: 100 + 60 draws in each epoch, and each of the 40 has its turn of the halves."""
    lock = lock_of((40, 5.0), (60, 2.0))
    plan = Plan(lock, batch_size=4, seed=3)
    assert plan.batches_per_epoch == 40
    epochs = 200
    drawn = Counter(slot.image for step in range(40 * epochs) for slot in plan.batch(step))
    assert {drawn[i] for i in range(40, 100)} == {epochs}
    heavy = np.array([drawn[i] for i in range(40)]) / epochs
    assert heavy.mean() == 2.5
    assert abs(heavy - 2.5).max() < 4 * (0.25 / epochs) ** 0.5  # four standard deviations of a fair coin
    one = Counter(slot.image for step in range(40) for slot in plan.batch(step))
    assert set(one.values()) == {1, 2, 3}


def test_equal_weights_change_nothing():
    """Whatever their value: a plan of one folder is the one that it was before there were weights."""
    plans = [Plan(lock_of((10, weight)), batch_size=3, seed=5) for weight in (1.0, 0.25, 1000.0)]
    for step in range(12):
        assert plans[0].batch(step) == plans[1].batch(step) == plans[2].batch(step)


def dropped(plan, steps):
    """How often the captions of each concept were dropped, and how many there were."""
    slots = [slot for step in range(steps) for slot in plan.batch(step)]
    assert all((slot.caption == "") == slot.drop_caption for slot in slots)
    concepts = [plan.lock.images[slot.image].concept for slot in slots]
    lost = Counter(concept for concept, slot in zip(concepts, slots, strict=True) if slot.drop_caption)
    return lost, Counter(concepts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_concept_drops_as_many_captions_as_it_should(seed):
    """Each rate within four standard deviations of its binomial; of 0 and 1, exactly."""
    asked = (0.0, 0.04, 0.3, 1.0)
    lost, seen = dropped(Plan(lock_of(*[(20, 1.0)] * 4), batch_size=4, seed=seed, caption_dropout=asked), 3000)
    for concept, rate in enumerate(asked):
        spread = (rate * (1 - rate) / seen[concept]) ** 0.5
        assert abs(lost[concept] / seen[concept] - rate) <= 4 * spread


def test_concepts_that_drop_alike_drop_what_they_dropped_before_there_was_a_rate_of_their_own():
    """The draws belong to (step, slot): another concept's rate moves none of them."""
    lock = lock_of((9, 1.0), (9, 1.0))
    one, same, other = (Plan(lock, batch_size=4, seed=2, caption_dropout=p) for p in (0.3, (0.3, 0.3), (0.3, 0.9)))
    assert [one.batch(step) for step in range(60)] == [same.batch(step) for step in range(60)]
    slots = [pair for step in range(60) for pair in zip(one.batch(step), other.batch(step), strict=True)]
    first = [(a, b) for a, b in slots if lock.images[a.image].concept == 0]
    assert all(a == b for a, b in first)
    assert all(b.drop_caption for a, b in slots if a.drop_caption)
    assert {slot.drop_caption for slot, _ in slots} == {True, False}


def test_a_job_says_how_often_a_concept_drops_captions_and_captions_of_the_rest():
    """Class images are no concept of the job's: theirs go by dataset.captions.dropout."""
    concepts = [{"source": "file:///a/", "captionDropout": 1}, {"source": "file:///b/"}]
    booth = {"instancePrompt": "a photo of sks dog", "classPrompt": "a photo of a dog"}
    spec = spec_of(
        {"concepts": concepts, "captions": {"dropout": 0.25}},
        method="DreamBooth", dreamBooth=booth, training={"batchSize": 4},
    )  # fmt: skip
    assert spec.dataset.caption_dropouts == (1, 0.25)
    kinds = [("instance", 0), ("instance", 1), ("class", 2)]
    lock = DatasetLock(
        tuple(
            LockedImage(f"{concept}{i}", "k", 64, 64, "c", (64, 64), "train", concept=concept, role=role)
            for role, concept in kinds
            for i in range(8)
        ), {}, {},
    )  # fmt: skip
    lost, seen = dropped(plan_of(spec, lock, captions=CaptionVariants(Captions(), variants=2, seed=42)), 600)
    assert lost[0] == seen[0]
    for concept in (1, 2):
        assert abs(lost[concept] / seen[concept] - 0.25) <= 4 * (0.25 * 0.75 / seen[concept]) ** 0.5
    assert Dataset(source="file:///a/").caption_dropouts == (0.05,)


def tagged(caption, *, split="train", content="a"):
    return LockedImage(content, "k", 64, 64, caption, (64, 64), split)


def test_tags_are_shuffled_for_each_variant_and_the_prefix_stays():
    captions = Captions(shuffleTags=True, prefix="sks, ")
    image = tagged("sks, red, green , blue,black, white")
    variants = CaptionVariants(captions, variants=4, seed=1).of(image)
    assert len(set(variants)) > 1
    for text in variants:
        assert text.startswith("sks, ")
        assert sorted(text.removeprefix("sks, ").split(", ")) == ["black", "blue", "green", "red", "white"]
    assert variants == CaptionVariants(captions, variants=4, seed=1).of(image)
    assert variants != CaptionVariants(captions, variants=4, seed=2).of(image)
    assert variants[:2] == CaptionVariants(captions, variants=2, seed=1).of(image)


def test_a_comma_too_many_makes_no_tag():
    """Files of taggers end in a comma: shuffled, it would stand anywhere, as a tag without words."""
    captions = Captions(shuffleTags=True, prefix="sks, ")
    for text in CaptionVariants(captions, variants=8, seed=1).of(tagged("sks, red,, green, ")):
        assert sorted(text.removeprefix("sks, ").split(", ")) == ["green", "red"]
    assert CaptionVariants(captions, variants=2, seed=1).of(tagged("sks, ")) == ("sks, ",) * 2


def test_captions_stay_as_they_are_where_nothing_is_shuffled():
    image = tagged("red, green , blue")
    assert CaptionVariants(Captions(), variants=3, seed=1).of(image) == ("red, green , blue",) * 3
    held_out = tagged("red, green", split="validation")
    assert CaptionVariants(Captions(shuffleTags=True), variants=3, seed=1).of(held_out) == ("red, green",)


def test_epochs_see_other_orders_of_the_tags():
    lock = DatasetLock((tagged("a, b, c, d, e, f"),), {}, {})
    captions = CaptionVariants(Captions(shuffleTags=True), variants=8, seed=1)
    plan = Plan(lock, batch_size=1, seed=1, variants=8, captions=captions)
    seen = [plan.batch(step)[0] for step in range(40)]
    assert len({slot.caption for slot in seen}) > 4
    assert all(slot.caption == captions.of(lock.images[0])[slot.variant] for slot in seen)


def checkerboard(side, square, *, low=0, high=255):
    x, y = np.meshgrid(np.arange(side) // square, np.arange(side) // square)
    return Image.fromarray(np.where((x + y) % 2, high, low).astype(np.uint8)).convert("RGB")


def test_sharpness_is_the_variance_of_the_laplacian():
    """By hand: of squares of one pixel, the Laplacian is +-4 x 255 everywhere, so its variance is (4 x 255)^2."""
    assert sharpness(checkerboard(32, 1), side=64) == pytest.approx((4 * 255) ** 2)
    assert sharpness(Image.new("RGB", (32, 32), (9, 99, 200)), side=64) == 0
    spot = Image.new("L", (5, 5))
    spot.putpixel((2, 2), 90)  # Laplacian of the inner 3 x 3: -360 in the middle, 90 at four sides, 0 at the corners
    assert sharpness(spot, side=64) == pytest.approx((360**2 + 4 * 90**2) / 9)
    assert sharpness(Image.new("RGB", (1, 50)), side=64) == 0


def test_sharpness_is_measured_at_the_size_that_is_trained_on():
    fine = checkerboard(256, 1)  # grey to an eye that sees 64 pixels
    coarse = checkerboard(256, 32).filter(ImageFilter.GaussianBlur(3))  # blurred at its size, and sharp at 64
    assert sharpness(fine, side=64) < 1 < sharpness(fine, side=256)
    assert sharpness(coarse, side=64) > 10 * sharpness(coarse, side=256)


def test_blurred_images_are_left_out(tmp_path):
    make_image_folder(tmp_path / "data", 3)
    Image.new("RGB", (64, 64), (10, 20, 30)).save(tmp_path / "data" / "000.png")
    filters = {"minSide": 16, "minSharpness": 0.1}
    lock = frozen(spec_of({"source": (tmp_path / "data").as_uri(), "filters": filters}), tmp_path)
    assert lock.rejected == {"sharpness below filters.minSharpness (0.1)": ("000.png",)}


def test_dreambooth_gives_every_instance_image_the_instance_prompt(tmp_path):
    make_image_folder(tmp_path / "data", 3)
    (tmp_path / "data" / "001.txt").unlink()
    booth = {"instancePrompt": "a photo of sks dog", "classPrompt": "a photo of a dog"}
    spec = spec_of({"source": (tmp_path / "data").as_uri()}, method="DreamBooth", dreamBooth=booth)
    assert {one.caption for one in frozen(spec, tmp_path).images} == {"a photo of sks dog"}


def test_the_dataset_has_its_sources():
    assert Dataset(source="s3://a/b/").sources == ("s3://a/b/",)
    concepts = ({"source": "s3://a/b/"}, {"source": "s3://a/c/"})
    assert Dataset.model_validate({"concepts": concepts}).sources == ("s3://a/b/", "s3://a/c/")
