"""CLIP score and KID against computation by hand; what is refused; that looking changes nothing."""

import json
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.kid import KernelInceptionDistance

from diffusion_api.job import TrainerSpec
from diffusion_api.validation import SamplePrompt
from diffusion_trainer.curves import Curves, Scored
from diffusion_trainer.data import DatasetLock, LockedImage, Pictures
from diffusion_trainer.errors import BadConfig, BadData, InputMissing
from diffusion_trainer.objectstore import open_store
from diffusion_trainer.scoring import drawing, files
from diffusion_trainer.scoring.clip import Clip
from diffusion_trainer.scoring.measures import clip_score, kid
from diffusion_trainer.scoring.scorer import Scorer, compared, open_scorer
from testkit.tiny import make_image_folder, make_tiny_clip

WORDS = "a red cat, sitting"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def clip(folder):
    return Clip.open(folder)


def picture(seed, size=(40, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def pixels_by_hand(seen):
    """Shorter side to 24 (bicubic), the middle, and OpenAI's means and deviations."""
    scale = 24 / min(seen.size)
    small = seen.resize((int(seen.width * scale), int(seen.height * scale)), Image.Resampling.BICUBIC)
    left, top = (small.width - 24) // 2, (small.height - 24) // 2
    values = np.asarray(small.crop((left, top, left + 24, top + 24)), dtype=np.float64) / 255
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor((values - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)[None]


@cache
def towers(folder):
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)


def features_by_hand(folder, *, seen=None, words=None):
    """Through the towers as transformers has them, and its own projections."""
    model, tokenizer = towers(folder)
    with torch.no_grad():
        if seen is not None:
            pooled = model.vision_model(pixel_values=pixels_by_hand(seen)).pooler_output
            return (model.visual_projection.weight.double() @ pooled[0].double()).numpy()
        tokens = tokenizer(words, return_tensors="pt", truncation=True, max_length=77)
        pooled = model.text_model(**tokens).pooler_output
        return (model.text_projection.weight.double() @ pooled[0].double()).numpy()


def cosine(x, y):
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


@pytest.mark.parametrize("words", [WORDS, "word " * 200])
def test_the_clip_score_is_the_cosine(clip, folder, words):
    found = {}
    text = features_by_hand(folder, words=words)
    for seed, size in ((1, (40, 24)), (2, (24, 24)), (3, (31, 57)), (4, (64, 64))):
        seen = picture(seed, size)
        found[seed] = clip_score(clip, seen, words)
        expected = 100 * max(0.0, cosine(features_by_hand(folder, seen=seen), text))
        assert found[seed] == pytest.approx(expected, abs=1e-4), size
        assert clip_score(clip, seen, words) == found[seed]
    assert len(set(found.values())) > 1


def test_a_picture_of_the_contrary_scores_nothing(clip):
    class Contrary(Clip):
        def get_text_features(self, *_):
            return -clip.look_at(picture(1))[None]

    opposed = Contrary(clip._model, clip._tokenizer, clip._eye)
    assert clip_score(opposed, picture(1), WORDS) == 0.0


def test_kid_is_the_mean_over_pairs_of_different_captions():
    numbers = np.random.default_rng(5)
    real, drawn = numbers.normal(size=(6, 10)), numbers.normal(0.4, 1.2, size=(6, 10))

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / 10 + 1) ** 3

    total = 0.0
    for i in range(6):
        for j in range(6):
            if i != j:
                total += kernel(real[i], real[j]) + kernel(drawn[i], drawn[j])
                total -= kernel(real[i], drawn[j]) + kernel(real[j], drawn[i])
    assert kid(torch.tensor(real), torch.tensor(drawn)) == pytest.approx(total / 30, rel=1e-12)


def test_it_is_that_of_torchmetrics_but_for_pairs_of_one_caption():
    numbers = torch.Generator().manual_seed(3)
    real, drawn = torch.randn(8, 10, generator=numbers).double(), torch.randn(8, 10, generator=numbers).double()
    with pytest.warns(UserWarning, match="large memory footprint"):
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=8)
    with torch.random.fork_rng():
        metric.update(real, real=True)
        metric.update(drawn, real=False)
        whole = metric.compute()[0].item()
    across = (real @ drawn.T / 10 + 1) ** 3
    apart = (across.sum() - across.trace()) / 56
    assert kid(real, drawn) == pytest.approx(whole + 2 * across.mean().item() - 2 * apart.item(), rel=1e-9)
    assert kid(real, drawn) != pytest.approx(whole, rel=1e-3)


def test_it_is_unbiased_where_pictures_share_captions():
    """Both sides are of one distribution, with a caption in common: the mean over many sets is 0."""
    numbers, found, biased = np.random.default_rng(7), [], []
    for _ in range(400):
        caption = numbers.normal(size=(5, 8))
        real, drawn = (torch.tensor(caption + 0.3 * numbers.normal(size=(5, 8))) for _ in range(2))
        found.append(kid(real, drawn))
        x, y = real.numpy(), drawn.numpy()
        pairs = (x * y).sum(axis=1) / 8 + 1
        apart = (((x @ y.T / 8 + 1) ** 3).sum() - (pairs**3).sum()) / 20
        biased.append(found[-1] + 2 * apart - 2 * ((x @ y.T / 8 + 1) ** 3).mean())
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert np.mean(biased) < -10 * error  # what leaving the pairs in would say


def lock_of(count, *, shapes=((32, 32), (40, 24)), held_out=True):
    split = "validation" if held_out else "train"
    images = [
        LockedImage(f"{7 * i % 10}{i}", f"{i}.png", 64, 64, f"picture {i}", shapes[i % len(shapes)], split)
        for i in range(count)
    ]
    return DatasetLock(tuple(images), {}, {})


def spec_of(**scores):
    return TrainerSpec.model_validate(
        {
            "method": "LoRA",
            "model": {"source": "s3://a/model/"},
            "dataset": {"source": "s3://a/data/", "resolution": 64},
            "validation": {
                "prompts": [{"prompt": "a cat"}],
                "scores": {"model": "s3://a/clip/", **scores},
            },
            "output": {"destination": "s3://a/out/"},
        }
    )


def scorer_of(clip, images, said=None, **options):
    real, report = (lambda image: picture(int(image.id), image.bucket)), ([] if said is None else said).append
    return Scorer(clip, images, real, device=CPU, report=report, **options)


def drawn(images):
    assert len({image.bucket for image in images}) == 1
    return [picture(100 + int(image.id), image.bucket) for image in images]


@pytest.mark.parametrize("processes", [2, 3])
def test_scores_do_not_depend_on_who_draws_and_nobodys_numbers_move(clip, folder, processes):
    images = compared(lock_of(9), spec_of(images=7))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()  # noqa: NPY002
    shown = [(picture(50), "a cat"), (picture(51), " ")]
    said = []
    alone = scorer_of(clip, images, said)
    whole = alone.conclude(12, alone.look(drawn), shown)
    assert alone.conclude(12, alone.look(drawn), shown) == whole  # the same once more
    assert said == [f"looking at held-out images {n}/7" for n in range(1, 8)]  # once: they stay the same
    shared = scorer_of(clip, images)
    found = [one for rank in range(processes) for one in shared.look(drawn, part=slice(rank, None, processes))]
    assert shared.conclude(12, json.loads(json.dumps(found)), shown) == whole
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[2])

    looked = [features_by_hand(folder, seen=drawn([image])[0]) for image in images]
    real = [features_by_hand(folder, seen=picture(int(image.id), image.bucket)) for image in images]
    assert whole.kid == pytest.approx(kid(torch.tensor(np.array(real)), torch.tensor(np.array(looked))), rel=1e-4)
    pairs = [*zip(looked, [image.caption for image in images], strict=True)]
    pairs.append((features_by_hand(folder, seen=picture(50)), "a cat"))  # what has no words is not scored
    scores = [100 * max(0.0, cosine(one, features_by_hand(folder, words=words))) for one, words in pairs]
    assert whole.clip_score == pytest.approx(sum(scores) / 8, abs=1e-4)


def test_without_kid_the_prompts_are_scored_and_without_words_nothing_is(clip):
    scorer = scorer_of(clip, ())
    assert scorer.look(drawn) == []
    found = scorer.conclude(3, [], [(picture(50), "a cat")])
    assert found == Scored(3, clip_score(clip, picture(50), "a cat"), None)
    wordless = scorer_of(clip, (), words=False)
    assert wordless.conclude(3, [], [(picture(50), "a cat")]) == Scored(3)


def test_pictures_are_of_the_first_by_content_hash():
    lock = lock_of(9)
    assert [image.id for image in compared(lock, spec_of(images=4))] == sorted(image.id for image in lock.images)[:4]
    assert len(compared(lock, spec_of(images=64))) == 9
    assert compared(lock_of(9, held_out=False), spec_of()) == ()
    with pytest.raises(BadConfig, match=r"scores.images is 4, but 1 of 1 images are held out.*fraction, or use images"):
        compared(lock_of(1), spec_of(images=4))


def test_pictures_are_drawn_as_sample_prompts_are_by_default(monkeypatch):
    asked = []
    monkeypatch.setattr(drawing, "draw", lambda family, wanted, *, size: asked.append((family, wanted, size)))

    class Words:
        def text(self, caption):
            return {"text": torch.full((2, 3), float(len(caption)))}

        def conditioning(self, cached):
            return cached

    images = [image for image in lock_of(6).images if image.bucket == (40, 24)]
    for seed in (1, 1, 2):
        drawing.pictures_of(images, "family", Words(), text=Words(), seed=seed)
    (family, first, size), (_, again, _), (_, other, _) = asked
    assert (family, size) == ("family", (40, 24))
    assert first[0].conditioning["text"][:, 0, 0].tolist() == [0.0, 9.0]  # nothing to keep away from; "picture 1"
    usual = SamplePrompt(prompt="")
    assert {(one.steps, one.guidance) for one in first} == {(usual.steps, usual.guidance_scale)}
    seeds = [[one.seed for one in wanted] for wanted in (first, again, other)]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 6


def test_held_out_images_are_compared_as_the_loss_sees_them(folder, tmp_path):
    make_image_folder(tmp_path / "data", 1, sizes=((96, 64),))
    pictures = Pictures([open_store(f"file://{tmp_path}/data")], tmp_path / "work")
    image = LockedImage(pictures.download("000.png"), "000.png", 96, 64, "", (32, 32), "validation")
    lock = DatasetLock((image,), {}, {})
    source = open_store(f"file://{folder}")
    scorer = open_scorer(spec_of(), lock, pictures, source=source, device=CPU, report=str)
    assert scorer.images == ()
    shown = np.asarray(scorer.real(image), dtype=int)
    whole = Image.open(tmp_path / "data" / "000.png").convert("RGB")
    expected = np.asarray(whole.resize((32, 32), Image.Resampling.LANCZOS, box=(16, 0, 80, 64)), dtype=int)
    assert np.abs(shown - expected).max() <= 1
    assert open_scorer(spec_of(), lock, pictures, source=None, device=CPU, report=str) is None


def spoilt(folder, tmp_path, change):
    copy = tmp_path / "clip"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    change(copy)
    return open_store(f"file://{copy}")


def set_in(path: Path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda at: (at / "config.json").unlink(),
            InputMissing,
            r"scores.model .* has no config.json; give the folder",
        ),
        (lambda at: (at / "preprocessor_config.json").unlink(), InputMissing, "has no preprocessor_config.json"),
        (lambda at: (at / "merges.txt").unlink(), InputMissing, "has no tokenizer: add tokenizer.json, or"),
        (lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"), InputMissing, "only safetensors"),
        (lambda at: set_in(at / "config.json", model_type="siglip"), BadData, "has model_type 'siglip'; use a CLIP"),
        (lambda at: set_in(at / "config.json", auto_map={}), BadData, "config.json has the key 'auto_map'"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_other_models_are_refused_before_they_are_loaded(folder, tmp_path, change, kind, message, weights):
    with pytest.raises(kind, match=message):
        files.fetch_clip(spoilt(folder, tmp_path, change), tmp_path / "work", weights=weights)


def test_only_known_files_are_downloaded(folder, tmp_path):
    def litter(at):
        (at / "modeling.py").write_text("raise SystemExit")
        (at / "pytorch_model.bin").write_bytes(b"x")

    fetched = files.fetch_clip(spoilt(folder, tmp_path, litter), tmp_path / "work")
    assert {path.name for path in fetched.iterdir()} == {path.name for path in folder.iterdir()}
    looked = files.fetch_clip(spoilt(folder, tmp_path / "clip", lambda _: None), tmp_path / "look", weights=False)
    assert {path.suffix for path in looked.iterdir()} == {".json"}


def test_a_preprocessor_of_another_model_is_refused(folder, tmp_path):
    spoilt(folder, tmp_path, lambda at: set_in(at / "preprocessor_config.json", crop_size={"height": 8, "width": 8}))
    with pytest.raises(BadData, match=r"makes pictures of 8 x 8, and the model takes 24 x 24"):
        Clip.open(tmp_path / "clip")


def test_settings_as_openai_wrote_them_are_read(folder, tmp_path):
    published = {
        "crop_size": 24, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 24,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    spoilt(folder, tmp_path, lambda at: (at / "preprocessor_config.json").write_text(json.dumps(published)))
    assert torch.equal(Clip.open(tmp_path / "clip").look_at(picture(1)), Clip.open(folder).look_at(picture(1)))


def test_a_trainer_without_the_library_says_what_is_missing(monkeypatch):
    files.check_library()
    monkeypatch.setattr(files, "find_spec", lambda name: None if name == "torchmetrics" else sys)
    with pytest.raises(BadConfig, match=r"validation.scores is set, .* lacks torchmetrics; .*trainer,metrics"):
        files.check_library()


def test_the_curves_hold_scores_and_older_ones_have_none():
    curves = Curves()
    curves.note(1, loss=torch.tensor(1.0), learning_rate=0.1, grad_norm=torch.tensor(1.0))
    curves.settle()
    curves.evaluate(1, None, Scored(1, 20.0, None))
    curves.evaluate(1, None, Scored(1, 21.5, -0.25))  # done again, there once
    again = Curves.restored(curves.tensors(), json.loads(json.dumps(curves.scalars())))
    assert again.scores == [Scored(1, 21.5, -0.25)]
    line = json.loads(again.to_jsonl())
    assert (line["clip_score"], line["kid"]) == (21.5, -0.25)
    scalars = {name: value for name, value in curves.scalars().items() if name != "scores"}
    assert Curves.restored(curves.tensors(), scalars).scores == []  # as of a checkpoint from before
    curves.evaluate(1, None, Scored(1, None, float("nan")))
    line = json.loads(curves.to_jsonl())
    assert line["kid"] is None
    assert "clip_score" not in line
