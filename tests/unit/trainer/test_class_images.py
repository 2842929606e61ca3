"""Class images: their shapes and seeds, drawn when missing, and the very same when a run is resumed."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_api.job import TrainerSpec
from diffusion_trainer import class_images
from diffusion_trainer.class_images import LOCK_KEY, PREFIX, wanted_images, with_class_images
from diffusion_trainer.data import DatasetLock, LockedImage, Pictures, Plan
from diffusion_trainer.errors import BadConfig, BadData
from diffusion_trainer.objective import DiscreteProcess
from diffusion_trainer.objectstore import open_store
from diffusion_trainer.peers import Peers

SHAPES = ((64, 64), (80, 48), (48, 80))


def lock_of(*counts):
    images = [
        LockedImage(f"{shape}{i}", "k", 64, 64, "a photo of sks dog", shape, "train")
        for shape, count in zip(SHAPES, counts, strict=False)
        for i in range(count)
    ]
    return DatasetLock(tuple(images), {}, {})


def test_shapes_are_those_of_the_instance_images_in_their_shares():
    wanted = wanted_images(lock_of(6, 2), count=10, seed=1)
    assert Counter(one.shape for one in wanted) == {(64, 64): 7, (80, 48): 3}  # one each, and 6 and 2 of the other 8
    assert [one.key for one in wanted][:2] == ["class-images/00000.png", "class-images/00001.png"]
    assert len({one.seed for one in wanted}) == 10
    assert wanted == wanted_images(lock_of(6, 2), count=10, seed=1)
    assert {one.seed for one in wanted}.isdisjoint(one.seed for one in wanted_images(lock_of(6, 2), count=10, seed=2))


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=3), count=st.integers(3, 400))
def test_every_shape_has_some_and_all_are_dealt_out(counts, count):
    dealt = Counter(one.shape for one in wanted_images(lock_of(*counts), count=count, seed=1))
    assert dealt.total() == count
    assert set(dealt) == set(SHAPES[: len(counts)])
    for shape, members in zip(SHAPES, counts, strict=False):
        assert abs(dealt[shape] - 1 - (count - len(counts)) * members / sum(counts)) <= 1


def test_fewer_images_than_shapes_are_refused():
    with pytest.raises(BadConfig, match=r"classImages is 2, but the images have 3 shapes.*buckets.enabled"):
        wanted_images(lock_of(1, 1, 1), count=2, seed=1)


class Painter:
    """Stands for the base model; remembers what it was asked to draw."""

    process = DiscreteProcess(torch.ones(1000), "VPrediction", {})
    published = DiscreteProcess(torch.ones(1000), "Epsilon", {})

    def __init__(self, monkeypatch):
        self.drawn, self.encoded = [], []
        monkeypatch.setattr(class_images.sampling, "encoded", self.encode)
        monkeypatch.setattr(class_images.sampling, "draw", self.draw)

    def encode(self, family, prompts):
        assert family is self
        self.encoded += prompts
        return [{"text": prompt.prompt} for prompt in prompts]

    def draw(self, family, wanted, *, size, process):
        assert (family, process) == (self, self.published)
        self.drawn += wanted
        (one,) = wanted
        return (Image.new("RGB", size, tuple(one.seed >> shift & 255 for shift in (0, 8, 16))),)

    def release_encoders(self):
        pass


def spec_of(**booth):
    described = {"instancePrompt": "a photo of sks dog", "classPrompt": "a photo of a dog", "classImages": 4}
    return TrainerSpec.model_validate(
        {
            "method": "DreamBooth",
            "dreamBooth": described | booth,
            "model": {"source": "file:///model/"},
            "dataset": {"source": "file:///data/", "captions": {"prefix": "x, "}},
            "output": {"destination": "file:///out/"},
        }
    )


@pytest.fixture
def painter(monkeypatch):
    return Painter(monkeypatch)


@pytest.fixture
def join(tmp_path, painter):
    state = open_store((tmp_path / "state").as_uri())
    places = iter(range(100))

    def join(lock=None, spec=None, peers=None):
        pictures = Pictures([state, state], tmp_path / f"work-{next(places)}")  # another machine each time
        joined = with_class_images(
            lock or lock_of(3), painter, spec or spec_of(), state=state, pictures=pictures,
            peers=peers or Peers(), report=lambda _: None,
        )  # fmt: skip
        return joined, pictures

    join.state = state
    return join


def test_missing_class_images_are_drawn_by_the_base_model_and_train_beside_the_others(join, painter):
    lock, pictures = join()
    assert len(painter.drawn) == 4
    drawn = {(one.conditioning["text"], one.steps, one.guidance) for one in painter.drawn}
    assert drawn == {("x, a photo of a dog", 50, 7.5)}
    assert [(one.prompt, one.negative_prompt) for one in painter.encoded] == [("x, a photo of a dog", "")]  # once
    classes = [one for one in lock.images if one.role == "class"]
    assert lock.images[:3] == lock_of(3).images
    assert {(one.caption, one.split, one.concept, one.bucket) for one in classes} == {
        ("x, a photo of a dog", "train", 1, (64, 64))
    }
    with Image.open(pictures.path(classes[0])) as picture:
        assert picture.size == (64, 64)
    assert len({one.id for one in classes}) == 4
    assert [slot.weight for slot in Plan(lock, batch_size=2, seed=1, prior_loss_weight=0.5).batch(0)] == [2, 1]


def test_an_attempt_that_resumes_draws_nothing_and_has_the_same_lock(join, painter):
    first, _ = join()
    painter.drawn.clear()
    again, pictures = join()
    assert painter.drawn == []
    assert len(painter.encoded) == 1
    assert again == first
    assert again.sha == first.sha
    assert pictures.path(again.images[-1]).exists()


def test_an_attempt_that_was_stopped_within_it_draws_the_rest(join, painter):
    join()
    whole = {info.key: join.state.get(info.key) for info in join.state.list(PREFIX)}
    join.state.delete(LOCK_KEY)
    for key in sorted(whole)[2:]:
        join.state.delete(key)
    painter.drawn.clear()
    join()
    assert len(painter.drawn) == 2
    assert {info.key: join.state.get(info.key) for info in join.state.list(PREFIX)} == whole


def test_several_processes_draw_a_part_each(join, painter):
    class Second(Peers):
        rank, world_size, leads = 1, 2, False

        def meet(self, name):
            raise StopIteration(name)

    with pytest.raises(StopIteration):
        join(peers=Second())
    assert [info.key for info in join.state.list(PREFIX)] == [f"{PREFIX}00001.png", f"{PREFIX}00003.png"]
    one_of_two = [one.seed for one in painter.drawn]
    assert one_of_two == [one.seed for one in wanted_images(lock_of(3), count=4, seed=42)][1::2]


def test_a_changed_class_image_is_noticed(join):
    lock, _ = join()
    join.state.put(lock.images[-1].key, b"something else")
    _, elsewhere = join()
    with pytest.raises(BadData, match="has changed since"):
        elsewhere.path(lock.images[-1])


@pytest.mark.parametrize("booth", [{"priorLossWeight": 0}, {"priorLossWeight": 0, "classPrompt": None}])
def test_without_a_prior_nothing_is_drawn(join, painter, booth):
    lock, _ = join(spec=spec_of(**booth))
    assert (lock, painter.drawn) == (lock_of(3), [])


def test_all_processes_do_as_the_leader_saw(join):
    """An older attempt that is not quite dead may freeze class images between two looks at the bucket."""
    join()
    met = []

    class Second(Peers):
        rank = 1

        def as_leader_says(self, _name, _value):
            return False  # it looked before

        def meet(self, name):
            met.append(name)

    lock, _ = join(peers=Second())
    assert met == ["class images"]  # where the leader waits for it
    assert sum(one.role == "class" for one in lock.images) == 4
