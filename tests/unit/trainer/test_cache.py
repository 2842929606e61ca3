"""The cache: found again when nothing changed, never when something did, and never believed unseen."""

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diffusion_api import names
from diffusion_api.dataset import Augmentation, Dataset
from diffusion_trainer.cache import build, building
from diffusion_trainer.cache.building import _shards
from diffusion_trainer.cache.keys import latents_key, text_key
from diffusion_trainer.data import Folder, Pictures, Plan, Share, Variants, freeze, open_loader
from diffusion_trainer.data.decoding import decode
from diffusion_trainer.data.lock import LockedImage
from diffusion_trainer.data.transforms import Variant, transform
from diffusion_trainer.errors import BadData, StorageUnavailable
from diffusion_trainer.methods import TextPath
from diffusion_trainer.objective import DiscreteObjective
from diffusion_trainer.objectstore import open_store
from testkit.tiny import make_image_folder


class CountingFamily:
    """Encoders that are sums, and count what they are asked for."""

    def __init__(self, *, vae="vae-1", text="text-1", scale=1.0):
        self.vae, self.words, self.scale = vae, text, scale
        self.images, self.captions = 0, []
        self.conditioning_names, self.token_names = ("text",), ("tokens",)

    def vae_hash(self):
        return self.vae

    def text_hash(self):
        return self.words

    def encode_images(self, pixels):
        self.images += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 8).sum(1, keepdim=True).expand(-1, 4, -1, -1) * self.scale
        return mean, mean.abs() + 0.5

    def encode_text(self, captions):
        self.captions += captions
        rows = torch.stack([torch.full((77, 8), float(len(caption))) for caption in captions])
        return {name: rows[:, i] if i else rows for i, name in enumerate(self.conditioning_names)}

    def tokenize(self, captions):
        return {"tokens": torch.tensor([[len(caption), 49407] for caption in captions])}


class Bench:
    """A frozen dataset and an output destination."""

    def __init__(self, tmp_path, count=6):
        self.root = tmp_path
        self.data = make_image_folder(tmp_path / "data", count, sizes=((64, 64), (96, 64)))
        self.source = open_store(self.data.as_uri())
        self.store = open_store((tmp_path / "out").as_uri())
        self.told = []
        self.refreeze()

    def refreeze(self, **sections):
        dataset = {"source": self.data.as_uri(), "resolution": 64, "buckets": {"step": 8}, "filters": {"minSide": 16}}
        self.lock = freeze(
            Dataset.model_validate(dataset | sections),
            (Folder(self.source),),
            seed=1,
            batch_size=1,
            work=self.root / "work-freeze",
            report=lambda _: None,
        )

    def build(self, family, *, work="work", augmentation=None, store=None, **options):
        self.told.clear()
        return build(
            self.lock,
            family,
            store or self.store,
            variants=Variants(augmentation or Augmentation(), seed=1),
            pictures=Pictures([self.source], self.root / work),
            report=self.told.append,
            **options,
        )

    def objects(self):
        return {info.key: self.store.get(info.key) for info in self.store.list(names.CACHE_PREFIX)}


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def contents(bench, cache):
    latents = [cache.latents(i, 0) for i in range(len(bench.lock.images))]
    texts = [cache.text(image.caption)["text"] for image in bench.lock.images]
    return torch.cat([torch.stack(pair).flatten() for pair in latents] + [text.flatten() for text in texts])


def test_what_is_read_is_what_was_encoded_in_bf16(bench):
    family = CountingFamily()
    cache = bench.build(family)
    variants = Variants(Augmentation(), seed=1)
    pictures = Pictures([bench.source], bench.root / "work")
    for i, image in enumerate(bench.lock.images):
        for k, variant in enumerate(variants.of(image)):
            pixels, _ = transform(decode(pictures.path(image)), variant, image.bucket)
            mean, std = CountingFamily().encode_images(pixels[None])
            read = cache.latents(i, k)
            assert torch.equal(read[0], mean[0].to(torch.bfloat16).float())
            assert torch.equal(read[1], std[0].to(torch.bfloat16).float())
            assert read[0].shape == (4, image.bucket[1] // 8, image.bucket[0] // 8)
        assert (cache.text(image.caption)["text"] == len(image.caption)).all()
    assert (cache.text("")["text"] == 0).all()
    assert cache.text("")["text"].shape == (77, 8)


def test_diffusers_sdxl_decodes_pictures_in_the_step(bench, monkeypatch):
    """Its script opens, decodes, resizes and cuts each picture in each step, and encodes it: here a step reads."""
    family = CountingFamily()
    cache = bench.build(family)
    plan = Plan(bench.lock, batch_size=2, seed=1, variants=2)
    objective = DiscreteObjective.of(torch.linspace(0.999, 0.005, 1000), prediction="Epsilon", gamma=None)
    pictures = Pictures([bench.source], bench.root / "work")

    class AsTheScript:
        """Reads what is not of a picture from the cache."""

        geometry, text = cache.geometry, cache.text

        def latents(self, number, variant):
            image = bench.lock.images[number]
            drawn = Variants(Augmentation(), seed=1).of(image)[variant]
            mean, std = family.encode_images(transform(decode(pictures.path(image)), drawn, image.bucket)[0][None])
            return mean[0], std[0]

    def steps(cache):
        return len(list(open_loader(plan, cache, steps=range(6), share=Share(2), objective=objective)))

    def check(cache, forbidden):
        def touched(*_, **__):
            raise AssertionError("a step works on a picture")

        with monkeypatch.context() as watched:
            for owner, name in forbidden:
                watched.setattr(owner, name, touched)
            assert steps(cache) == 6

    assert steps(AsTheScript()) == 6
    work = [(Image, "open"), (Image.Image, "resize"), (family, "encode_images"), (family, "encode_text")]
    check(cache, work)
    for one in work[:3]:
        with pytest.raises(AssertionError):
            check(AsTheScript(), [one])


def test_a_caption_has_a_part_for_each_name(bench):
    family = CountingFamily()
    family.conditioning_names = ("text", "pooled")
    cache = bench.build(family)
    for caption in ("", *(image.caption for image in bench.lock.images)):
        found = cache.text(caption)
        assert {name: rows.shape for name, rows in found.items()} == {"text": (77, 8), "pooled": (8,)}
        assert all((rows == len(caption)).all() for rows in found.values())


def test_a_family_without_text_has_an_empty_conditioning(bench):
    family = CountingFamily()
    family.conditioning_names = ()
    cache = bench.build(family)
    assert cache.text("") == cache.text(bench.lock.images[0].caption) == {}
    assert family.captions == []


def test_tokens_are_kept_as_they_are(bench):
    """bf16 has 8 bits of precision: 49407 would become 49408."""
    family = CountingFamily()
    cache = bench.build(family, text=TextPath(family, live=True))
    for image in bench.lock.images:
        assert cache.text(image.caption)["tokens"].tolist() == [len(image.caption), 49407]
    assert set(bench.build(CountingFamily()).text("")) == {"text"}


def test_the_geometry_is_that_of_the_crop_that_was_encoded(bench):
    augmentation = Augmentation(crop="Random", variants_per_image=3)
    cache = bench.build(CountingFamily(), augmentation=augmentation)
    variants, pictures = Variants(augmentation, seed=1), Pictures([bench.source], bench.root / "work")
    for i, image in enumerate(bench.lock.images):
        for k, variant in enumerate(variants.of(image)):
            _, told = transform(decode(pictures.path(image)), variant, image.bucket)
            assert cache.geometry(i, k).tolist() == [*told.original[::-1], *told.crop[::-1], *told.target[::-1]]


def test_a_second_build_encodes_nothing_and_downloads_no_image(bench):
    first = bench.build(CountingFamily())
    again = CountingFamily()
    second = bench.build(again, work="another-machine")
    assert (again.images, again.captions) == (0, [])
    assert not (bench.root / "another-machine" / "images").exists()
    assert torch.equal(contents(bench, first), contents(bench, second))
    assert bench.told == ["fetching latents 8/8", "fetching text 7/7"]


def test_fetched_and_built_are_the_same_bytes(bench, tmp_path):
    bench.build(CountingFamily())
    other = open_store((tmp_path / "out2").as_uri())
    bench.build(CountingFamily(), work="work2", store=other)
    assert {info.key: other.get(info.key) for info in other.list(names.CACHE_PREFIX)} == bench.objects()


def test_equal_variants_are_encoded_once_and_captions_too(bench):
    for sidecar in bench.data.glob("*.txt"):
        sidecar.write_text("all the same")
    bench.refreeze()
    family = CountingFamily()
    bench.build(family, augmentation=Augmentation(horizontal_flip=0, variants_per_image=8))
    assert family.images == len(bench.lock.images)
    assert Counter(family.captions) == {"": 1, "all the same": 1}


def encoded(bench, family=None, **options):
    family = family or CountingFamily()
    bench.build(family, **options)
    return family.images, len(family.captions)


def test_what_changes_the_content_changes_the_name(bench):
    assert encoded(bench) != (0, 0)
    assert encoded(bench) == (0, 0)
    assert encoded(bench, CountingFamily(vae="vae-2"))[0] > 0
    assert encoded(bench, CountingFamily(vae="vae-2")) == (0, 0)
    assert encoded(bench, CountingFamily(text="text-2")) == (0, 7)
    assert encoded(bench, augmentation=Augmentation(crop="Random"))[0] > 0
    bench.refreeze(resolution=128)
    assert encoded(bench)[0] > 0
    bench.refreeze()
    assert encoded(bench) == (0, 0)
    make_image_folder(bench.data, 1, seed=9)
    bench.refreeze()
    assert encoded(bench)[0] > 0


IMAGE = LockedImage("aa", "k", 96, 64, "c", (64, 64), "train")
VARIANT = Variant((96, 64), 16, 0, flip=False)


@pytest.mark.parametrize(
    ("image", "variant", "vae"),
    [
        (replace(IMAGE, id="ab"), VARIANT, "v"),
        (replace(IMAGE, bucket=(64, 56)), VARIANT, "v"),
        (IMAGE, replace(VARIANT, flip=True), "v"),
        (IMAGE, replace(VARIANT, left=15), "v"),
        (IMAGE, VARIANT, "w"),
    ],
)
def test_each_part_counts_for_the_key_of_latents(image, variant, vae):
    assert latents_key(image, variant, vae_hash=vae) != latents_key(IMAGE, VARIANT, vae_hash="v")


def test_names_captions_and_splits_do_not_count_for_the_key_of_latents():
    renamed = replace(IMAGE, key="other", caption="other", split="validation")
    assert latents_key(renamed, VARIANT, vae_hash="v") == latents_key(IMAGE, VARIANT, vae_hash="v")
    assert text_key("a", text_hash="t") != text_key("b", text_hash="t")
    assert text_key("a", text_hash="t") != text_key("a", text_hash="u")


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "empty", "swapped header"])
@pytest.mark.parametrize("where", ["bucket", "machine"])
def test_a_damaged_shard_is_noticed_and_mended(bench, damage, where):
    before = contents(bench, bench.build(CountingFamily()))
    good = bench.objects()
    for key, data in good.items():
        spoiled = {
            "flipped bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            "cut": data[:-1],
            "empty": b"",
            "swapped header": data.replace(b"BF16", b"F16 ", 1),
        }[damage]
        if where == "bucket":
            bench.store.put(key, spoiled)
        else:
            (bench.root / "work" / key).write_bytes(spoiled)
    family = CountingFamily()
    mended = bench.build(family, work="fresh" if where == "bucket" else "work")
    assert (family.images > 0) == (where == "bucket")
    assert torch.equal(contents(bench, mended), before)
    assert bench.objects() == good


def test_an_interrupted_build_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_trainer.cache.building._ENTRIES_PER_SHARD", 4)
    bench = Bench(tmp_path, count=12)

    class Interrupted(CountingFamily):
        def encode_images(self, pixels):
            if self.images >= 8:
                raise StorageUnavailable("the node went away")
            return super().encode_images(pixels)

    first = Interrupted()
    with pytest.raises(StorageUnavailable):
        bench.build(first)
    assert bench.objects()
    second, whole = CountingFamily(), CountingFamily()
    cache = bench.build(second, work="another-machine")
    reference = bench.build(whole, work="third", store=open_store((tmp_path / "out2").as_uri()))
    assert 0 < second.images < whole.images
    assert torch.equal(contents(bench, cache), contents(bench, reference))


def test_of_two_builders_the_first_wins(bench):
    """Another GPU rounds differently. Whoever comes second must use what the first has trained with."""

    class Racing(CountingFamily):
        def encode_images(self, pixels):
            if not self.images:
                bench.build(CountingFamily(), work="the-other")
            return super().encode_images(pixels)

    mine = bench.build(Racing(scale=1.5))
    theirs = bench.build(CountingFamily(), work="the-other")
    assert torch.equal(contents(bench, mine), contents(bench, theirs))


def test_numbers_that_are_not_finite_name_the_image(bench):
    with pytest.raises(BadData, match=r"no finite numbers of 00\d\.\w+"):
        bench.build(CountingFamily(scale=float("nan")))


def test_a_cache_travels_to_another_process(bench):
    cache = bench.build(CountingFamily())
    before = contents(bench, cache)
    assert torch.equal(contents(bench, pickle.loads(pickle.dumps(cache))), before)


def test_a_changed_image_touches_few_shards():
    entries = [f"{i * 2**22:08x}" + "0" * 56 for i in range(1000)]
    before = _shards("latents", {entry: entry for entry in entries})
    after = _shards("latents", {entry: entry for entry in ["00000001" + "0" * 56, *entries[1:]]})
    assert len(before) == 8
    assert len({shard.key for shard in before} & {shard.key for shard in after}) == 7
    assert sorted(entry for shard in before for entry in shard.entries) == entries


def test_variants_of_an_image_lie_in_one_shard():
    images = {f"{variant}{i:04x}": f"{i * 2**22:08x}" for i in range(1000) for variant in "ab"}
    shards = _shards("latents", images)
    assert len(shards) == 16
    for shard in shards:
        first, second = ({key[1:] for key in shard.entries if key[0] == variant} for variant in "ab")
        assert first == second


def test_each_entry_is_a_sign_of_life(bench):
    bench.build(CountingFamily())
    latents = [f"encoding latents {i}/8" for i in range(1, 9)]  # of 12 variants 8 differ
    assert bench.told == latents + [f"encoding text {i}/7" for i in range(1, 8)]


# --- bugs of other trainers, planted ---


def test_onetrainer_175_everything_is_encoded_again(bench, monkeypatch):
    """An attempt on another machine, or after a change of options, began its cache from nothing."""

    def check(where):
        bench.build(CountingFamily(), work=f"{where}-1")
        again = CountingFamily()
        bench.build(again, work=f"{where}-2")
        assert (again.images, again.captions) == (0, [])

    check("ours")
    numbers = iter(range(10_000))
    monkeypatch.setattr(building, "latents_key", lambda image, *_, **__: f"{image.id[:8]}{next(numbers)}")
    with pytest.raises(AssertionError):
        check("planted")


def test_sd_scripts_2276_latents_of_another_vae_or_resolution():
    """Its files lie beside the images, and are believed whatever they were made with."""
    one = LockedImage("1" * 64, "a.png", 64, 64, "", (64, 64), "train")
    plain = Variant((64, 64), 0, 0, flip=False)

    def check(key):
        names = {
            key(one, plain, vae_hash="a"),
            key(one, plain, vae_hash="b"),
            key(replace(one, bucket=(96, 64)), plain, vae_hash="a"),
            key(one, replace(plain, flip=True), vae_hash="a"),
        }
        assert len(names) == 4

    check(latents_key)
    with pytest.raises(AssertionError):
        check(lambda image, _, *, vae_hash: f"{image.key}.npz")  # noqa: ARG005 - that is the bug


def test_diffusers_6362_everything_is_encoded_at_once(tmp_path, monkeypatch):
    """Its SDXL script encodes a thousand rows in one pass, and runs out of GPU memory before the first step."""

    class Watching(CountingFamily):
        pixels, rows = 0, 0

        def encode_images(self, pixels):
            self.pixels = max(self.pixels, pixels[:, 0].numel())
            return super().encode_images(pixels)

        def encode_text(self, captions):
            self.rows = max(self.rows, len(captions))
            return super().encode_text(captions)

    bench = Bench(tmp_path, count=12)

    def check(pixels, rows, work):
        monkeypatch.setattr(building, "_PIXELS_AT_A_TIME", pixels)
        monkeypatch.setattr(building, "_CAPTIONS_AT_A_TIME", rows)
        family = Watching()
        bench.build(family, work=work, store=open_store((tmp_path / work).as_uri()))
        assert 0 < family.pixels <= 2 * 96 * 64
        assert 0 < family.rows <= 4

    check(2 * 96 * 64, 4, "ours")
    for planted, limits in {"images": (10**9, 4), "captions": (2 * 96 * 64, 1000)}.items():
        with pytest.raises(AssertionError):
            check(*limits, planted)
