"""Bugs that other trainers had with data, captions, priors and validation. Each is planted here, and must be found."""

import hashlib
import json
import os
from collections import Counter
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_api.dataset import Augmentation, Buckets, Dataset
from diffusion_trainer.cache.keys import latents_key
from diffusion_trainer.data import DatasetLock, LockedImage, Plan, Share, Variants, loader, open_loader
from diffusion_trainer.data.buckets import choose, nearest
from diffusion_trainer.data.freezing import split
from diffusion_trainer.data.transforms import Variant, geometry, transform
from diffusion_trainer.objective import DiscreteObjective
from diffusion_trainer.peers import Peers
from diffusion_trainer.settings import read_settings
from diffusion_trainer.validation import BINS, validate

OBJECTIVE = DiscreteObjective.of(torch.linspace(0.999, 0.005, 1000), prediction="Epsilon", gamma=None)
SQUARE, WIDE = (64, 64), (80, 48)
NULL = 7.0


def image(number, *, bucket=SQUARE, side="train", role="instance"):
    content = hashlib.sha256(str(number).encode()).hexdigest()
    return LockedImage(content, f"{number}.png", 64, 64, "c" * (number + 1), bucket, side, role=role)


def lock(*images):
    return DatasetLock(tuple(images), {}, {})


class FakeCache:
    """Latents tell which image they are of, texts how long they are; the empty one is not zero, as encoders have it."""

    def latents(self, number, _variant):
        return torch.full((4, 8, 8), float(number)), torch.zeros(4, 8, 8)

    def geometry(self, _number, _variant):
        return torch.zeros(6)

    def text(self, caption):
        return {"text": torch.full((2, 3), float(len(caption)) or NULL)}


def batches(plan, cache=None, *, share=None, steps=40):
    made = open_loader(
        plan, cache or FakeCache(), steps=range(steps), share=share or Share(plan.batch_size), objective=OBJECTIVE
    )
    return [piece for pieces in made for piece in pieces]


def test_diffusers_14430_captions_of_other_images():
    """The cache of the SD3 script paired latents and captions by their place in a shuffled list."""

    def check(plan):
        for batch in batches(plan):
            for row, text in zip(batch.latents, batch.conditioning["text"], strict=True):
                assert text[0, 0] == row[0, 0, 0] + 1  # the caption of image n has n + 1 letters

    class Mispaired(Plan):
        def batch(self, step):
            slots = super().batch(step)
            return tuple(replace(slot, caption=other.caption) for slot, other in zip(slots, slots[::-1], strict=True))

    images = lock(*(image(i) for i in range(12)))
    check(Plan(images, batch_size=4, seed=1))
    with pytest.raises(AssertionError):
        check(Mispaired(images, batch_size=4, seed=1))


def test_diffusers_sdxl_tells_the_crop_of_another_draw():
    """Its script drew a new crop at each step, and told the model of the one that it had encoded."""
    pixels = np.zeros((64, 200, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(200)
    wide = replace(image(0), width=200)
    drawn = Variants(Augmentation(crop="Random", horizontal_flip=0, variants_per_image=8), seed=1).of(wide)

    def check(pairs):
        for variant, told in pairs:
            seen, _ = transform(Image.fromarray(pixels), variant, SQUARE)
            assert round((float(seen[0, 0, 0]) + 1) * 127.5) == told.crop[0]  # red is the column

    conditioning = [transform(Image.fromarray(pixels), variant, SQUARE)[1] for variant in drawn]
    check(zip(drawn, conditioning, strict=True))
    with pytest.raises(AssertionError):
        check(zip(drawn, conditioning[1:] + conditioning[:1], strict=True))


def test_simpletuner_484_images_of_small_buckets_are_never_seen():
    """Buckets with fewer images than a batch were dropped."""
    images = lock(*(image(i) for i in range(9)), image(9, bucket=WIDE))

    def check(plan):
        seen = Counter(slot.image for step in range(plan.batches_per_epoch) for slot in plan.batch(step))
        assert set(seen) == set(range(10))

    class Dropping(Plan):
        def _batches(self, epoch):
            return [batch for batch in super()._batches(epoch) if len(set(batch)) == self.batch_size] * 2

    check(Plan(images, batch_size=4, seed=1))
    with pytest.raises(AssertionError):
        check(Dropping(images, batch_size=4, seed=1))


def test_bmaltais_1629_latents_of_an_image_that_was_replaced():
    """Caches that go by a file's path give the old latents for a new image of the same name."""
    variant = Variants(Augmentation(), seed=1).of(image(0))[0]

    def check(key):
        assert key(image(0)) != key(replace(image(1), key=image(0).key))

    check(lambda one: latents_key(one, variant, vae_hash="v"))
    with pytest.raises(AssertionError):
        check(lambda one: json.dumps([one.key, one.bucket, "v"]))


def test_diffusers_empty_captions_are_encoded_and_not_zero():
    """Guidance uses the embedding of "" at inference; scripts that zero the embedding train another null row."""
    plan = Plan(lock(*(image(i) for i in range(4))), batch_size=4, seed=1, caption_dropout=1.0)

    class Zeros(FakeCache):
        def text(self, caption):
            return {"text": torch.zeros(2, 3)} if caption == "" else super().text(caption)

    def check(cache):
        assert all((batch.conditioning["text"] == NULL).all() for batch in batches(plan, cache, steps=3))

    check(FakeCache())
    with pytest.raises(AssertionError):
        check(Zeros())


def test_caption_dropout_of_scripts_depends_on_the_number_of_processes():
    """Draws from each process's own generator change with the GPUs, and begin anew when a run is resumed."""
    images = lock(*(image(i) for i in range(8)))

    def dropped(plan, world):
        shares = [Share(8 // world, rank=rank, world_size=world) for rank in range(world)]
        parts = [batches(plan(rank), share=share, steps=20) for rank, share in enumerate(shares)]
        return [
            [bool((row == NULL).all()) for part in parts for row in part[step].conditioning["text"]]
            for step in range(20)
        ]

    def check(plan):
        flags = dropped(plan, 1)
        assert any(any(step) for step in flags)
        assert dropped(plan, 2) == flags
        assert dropped(plan, 4) == flags

    class OwnGenerator(Plan):
        def __init__(self, rank):
            super().__init__(images, batch_size=8, seed=1, caption_dropout=0.3)
            self.numbers = np.random.default_rng(rank)

        def _drops_caption(self, step, slot, probability):  # noqa: ARG002 - that is the bug
            return bool(self.numbers.random() < probability)

    check(lambda _: Plan(images, batch_size=8, seed=1, caption_dropout=0.3))
    with pytest.raises(AssertionError):
        check(OwnGenerator)


def test_a_prior_loss_averaged_over_the_whole_batch_is_half_of_it():
    """Published: mean(instance) + weight x mean(class). One mean over the concatenated batch halves both."""
    images = lock(*(image(i) for i in range(2)), *(image(i, role="class") for i in range(2, 4)))

    def check(plan):
        (batch,) = batches(plan, steps=1)
        losses = torch.where(batch.latents[:, 0, 0, 0] < 2, 1.0, 10.0)
        assert float((batch.weights * losses).sum() / plan.batch_size) == pytest.approx(1 + 0.5 * 10)

    class Averaging(Plan):
        def batch(self, step):
            return tuple(replace(slot, weight=slot.weight / 2) for slot in super().batch(step))

    options = {"batch_size": 4, "seed": 1, "prior_loss_weight": 0.5}
    check(Plan(images, **options))
    with pytest.raises(AssertionError):
        check(Averaging(images, **options))


def held_out(part=slice(None), *, gather=list, loss=None):
    images = lock(*(image(i, side="validation") for i in range(6)))
    measure = loss or (lambda batch: batch.latents[:, 0, 0, 0])
    found = validate(
        images, FakeCache(), measure, objective=OBJECTIVE, seed=1, batch_size=4, device="cpu", part=part, gather=gather
    )
    assert found is not None
    return found


def test_kohya_validation_of_each_rank_is_its_own():
    """Every process logged the loss of its part of the images: the curve of rank 0 was that of a fraction."""
    first, second = [], []
    held_out(slice(0, None, 2), gather=lambda found: first.extend(found) or _rest(found))
    held_out(slice(1, None, 2), gather=lambda found: second.extend(found) or _rest(found))

    def check(pool):
        assert held_out(gather=lambda _: pool).loss == held_out().loss == 2.5  # the mean of 0 to 5

    check(first + second)
    with pytest.raises(AssertionError):
        check(_rest(first, value=0.0))


def _rest(found, value=0.0):
    """Complete what one process found, so that it can be averaged."""
    known = {(number, place): loss for number, place, loss in found}
    return [(number, place, known.get((number, place), value)) for number in range(6) for place in range(BINS)]


def test_onetrainer_validation_at_one_timestep_is_blind_to_detail():
    """At timestep 499 alone, a model that has lost all fine detail has the same loss as one that has not."""

    def blurred(batch):
        return (batch.times < 125).float()  # wrong where there is little noise, which is where detail is made

    def check(result):
        assert result > 0

    check(held_out(loss=blurred).loss)
    only = torch.full((6,), 499)
    with pytest.raises(AssertionError):
        check(float((only < 125).float().mean()))


def test_a_split_by_position_leaks_when_an_image_is_added():
    """With every 20th file held out, a new first file moves all of them: what was trained on is then held out."""
    names = [f"{i:03d}" for i in range(100)]

    def by_position(members, fraction, *, seed):  # noqa: ARG001 - that is the bug
        every = round(1 / fraction)
        return {name: "validation" if i % every == 0 else "train" for i, name in enumerate(sorted(members[0]))}

    def check(rule):
        before, after = rule([names], 0.05, seed=1), rule([["000-new", *names]], 0.05, seed=1)
        assert sum(before[name] != after[name] for name in names) <= 1

    check(split)
    with pytest.raises(AssertionError):
        check(by_position)


def test_accelerate_2016_a_resumed_run_begins_its_data_and_noise_anew(monkeypatch):
    """diffusers skips no batch that was trained on, sd-scripts knows the epoch only, and noise begins again."""
    images = lock(*(image(i) for i in range(14)))  # 4 batches an epoch
    first = 26

    def check(before, after):
        whole = batches(before, steps=40)[first:]
        resumed = [p for ps in open_loader(
            after, FakeCache(), steps=range(first, 40), share=Share(4), objective=OBJECTIVE
        ) for p in ps]  # fmt: skip
        for a, b in zip(whole, resumed, strict=True):
            assert torch.equal(a.latents, b.latents)
            assert torch.equal(a.times, b.times)
            assert torch.equal(a.noise, b.noise)

    class Anew(Plan):
        def batch(self, step):
            return super().batch(step - first)

    class FromTheEpoch(Plan):
        def batch(self, step):
            return super().batch(step - first + first // self.batches_per_epoch * self.batches_per_epoch)

    options = {"batch_size": 4, "seed": 1}
    check(Plan(images, **options), Plan(images, **options))
    for planted in (Anew, FromTheEpoch):
        with pytest.raises(AssertionError):
            check(Plan(images, **options), planted(images, **options))
    numbers = np.random.default_rng(1)  # one generator, whose state no checkpoint holds
    monkeypatch.setattr(loader, "stream", lambda *_: numbers)
    with pytest.raises(AssertionError):
        check(Plan(images, **options), Plan(images, **options))


def test_sd_scripts_1709_the_cache_holds_one_draw_of_the_latents():
    """Its files hold one sample of the VAE's posterior, seen in every epoch, and not its mean and deviation."""

    class Posterior(FakeCache):
        def latents(self, number, _variant):
            return torch.full((4, 8, 8), float(number)), torch.ones(4, 8, 8)

    class OneDraw(Posterior):
        def latents(self, number, variant):
            mean, std = super().latents(number, variant)
            return mean + std * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(number)), 0 * std

    def check(cache):
        seen = [batch.latents[0] for batch in batches(Plan(lock(image(0)), batch_size=1, seed=1), cache, steps=6)]
        assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])

    check(Posterior())
    with pytest.raises(AssertionError):
        check(OneDraw())


class Asked:
    """Steps that remember which of them the loader has asked for."""

    def __init__(self, count):
        self.count, self.steps = count, []

    def __len__(self):
        return self.count

    def __iter__(self):
        for step in range(self.count):
            self.steps.append(step)
            yield step


class TellsItsMaker(FakeCache):
    def geometry(self, _number, _variant):
        return torch.full((6,), float(os.getpid()))  # exact: a process id has at most 22 bits


def test_diffusers_sdxl_makes_a_batch_when_the_step_needs_it_without_loader_workers():
    """By default no loader workers: 92 to 144 ms an image in the process that computes, while nothing is computed.

    No clock is looked at: when the first step is taken, the next ones have been asked for, of other processes.
    """
    plan = Plan(lock(*(image(i) for i in range(8))), batch_size=4, seed=1)

    def check(workers):
        asked = Asked(12)
        made = open_loader(
            plan, TellsItsMaker(), steps=asked, share=Share(4), objective=OBJECTIVE, workers=workers
        )  # fmt: skip
        with closing(made):
            (first,) = next(made)  # the step would be taken here
            assert asked.steps[:2] == [0, 1]
            assert os.getpid() not in first.geometry[:, 0].tolist()

    check(read_settings({}).loader_workers)
    with pytest.raises(AssertionError):
        check(0)


def test_diffusers_6234_mirrored_pictures_are_told_the_crop_of_those_that_are_not():
    pixels = np.zeros((64, 200, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(200)
    variant = Variant(scaled=(200, 64), left=30, top=0, flip=True)

    def check(told):
        seen, _ = transform(Image.fromarray(pixels), variant, SQUARE)
        left = told((200, 64), variant, SQUARE).crop[0]
        mirrored = pixels[:, ::-1, 0][:, left : left + 64]
        assert np.array_equal(((seen[0] + 1) * 127.5).round().numpy(), mirrored)

    check(geometry)
    with pytest.raises(AssertionError):
        check(lambda size, variant, target: geometry(size, replace(variant, flip=False), target))


def test_diffusers_7908_pictures_are_cut_to_squares():
    """Its scripts for SD1 and SDXL have no buckets: of a picture of 3:2 a third is never seen."""
    sizes = [(900, 600), (600, 900), (800, 800), (1024, 600)]

    def check(buckets):
        shapes = choose(sizes, Dataset(source="file:///d", resolution=512, buckets=buckets), batch_size=1)
        for width, height in sizes:
            to = nearest((width, height), shapes)
            ratios = sorted([width / height, to[0] / to[1]])
            assert ratios[0] / ratios[1] > 0.85  # of the picture is seen

    check(Buckets())
    with pytest.raises(AssertionError):
        check(Buckets(enabled=False))


def test_a_validation_on_rank_0_makes_the_others_wait():
    """diffusers and SimpleTuner measure everything on rank 0."""
    images = lock(*(image(i, side="validation") for i in range(6)))

    class OfFour(Peers):
        world_size = 4

        def __init__(self, rank):
            self.rank = rank

    class OnTheFirst(OfFour):
        @property
        def part(self):
            return slice(None) if self.leads else slice(0)

    def measured(peers):
        passes = []

        def loss(batch):
            passes.append(len(batch.latents))
            return batch.latents[:, 0, 0, 0]

        validate(
            images, FakeCache(), loss, objective=OBJECTIVE, seed=1, batch_size=4, device="cpu",
            part=peers.part, gather=lambda _: [],
        )  # fmt: skip
        return sum(passes)

    def check(kind):
        of_each = [measured(kind(rank)) for rank in range(4)]
        assert of_each == [6 * BINS // 4] * 4

    check(OfFour)
    with pytest.raises(AssertionError):
        check(OnTheFirst)
