"""From a folder to a lock: layouts, captions, filters, quarantine, split."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_api.dataset import Dataset
from diffusion_trainer.data import DatasetLock, Folder, Pictures, freeze
from diffusion_trainer.data.freezing import split
from diffusion_trainer.errors import BadData, InputMissing
from diffusion_trainer.objectstore import open_store
from diffusion_trainer.objectstore.parallel import in_parallel
from testkit.tiny import make_image_folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def frozen(folder, *, seed=1, batch_size=1, report=lambda _: None, **sections):
    sections.setdefault("filters", {}).setdefault("minSide", 16)
    sections.setdefault("resolution", 64)
    dataset = Dataset.model_validate({"source": folder.as_uri(), "buckets": {"step": 8}, **sections})
    return freeze(
        dataset,
        (Folder(open_store(folder.as_uri()), default=dataset.captions.default),),
        seed=seed,
        batch_size=batch_size,
        work=folder.parent / "work",
        report=report,
    )


def captions(lock):
    return {image.key: image.caption for image in lock.images}


@pytest.mark.parametrize("layout", ["Sidecar", "ImageFolder"])
@pytest.mark.parametrize("asked", ["Auto", "same"])
def test_both_layouts_are_read(folder, layout, asked):
    make_image_folder(folder, 4, captions=layout)
    lock = frozen(folder, format=layout if asked == "same" else "Auto")
    assert captions(lock) == {
        "000.png": "picture 0 of a thing",
        "001.jpg": "picture 1 of a thing",
        "002.webp": "picture 2 of a thing",
        "003.png": "picture 3 of a thing",
    }
    assert {(image.width, image.height, image.bucket) for image in lock.images} == {(64, 64, (64, 64))}


def test_a_lock_survives_its_json(folder):
    lock = frozen(make_image_folder(folder, 4))
    again = DatasetLock.from_json(lock.to_json())
    assert again == lock
    assert again.sha == lock.sha


def test_freezing_twice_gives_the_same_lock_and_another_seed_another_split(folder):
    make_image_folder(folder, 20)
    assert frozen(folder).to_json() == frozen(folder).to_json()
    assert frozen(folder).held_out != frozen(folder, seed=2).held_out


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{}", b'{"version": 1}', b'{"version": 2}', b"\xff"])
def test_what_is_no_lock_is_bad_data(damaged):
    with pytest.raises(BadData, match="dataset lock"):
        DatasetLock.from_json(damaged)


def test_caption_suffixes_folders_and_byte_order_marks(folder):
    make_image_folder(folder / "deep" / "er", 1, captions="None")
    (folder / "deep" / "er" / "000.caption").write_bytes(b"\xef\xbb\xbfein K\xc3\xa4tzchen\r\n")
    assert captions(frozen(folder)) == {"deep/er/000.png": "ein Kätzchen"}
    (folder / "deep" / "er" / "000.txt").write_text("txt comes first")
    assert captions(frozen(folder)) == {"deep/er/000.png": "txt comes first"}


def test_file_names_of_metadata_are_relative_to_it(folder):
    make_image_folder(folder / "train", 2, captions="ImageFolder")
    assert set(captions(frozen(folder))) == {"train/000.png", "train/001.jpg"}


def test_a_caption_may_have_any_character_that_is_no_line_end(folder):
    make_image_folder(folder, 1, captions="None")
    row = {"file_name": "000.png", "text": "a\u2028b\x85c"}
    (folder / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    assert captions(frozen(folder)) == {"000.png": "a\u2028b\x85c"}


def test_an_image_without_a_caption_is_an_error_that_names_it(folder):
    make_image_folder(folder, 7)
    (folder / "002.txt").unlink()
    (folder / "004.txt").write_text("  \n")
    with pytest.raises(BadData, match=r"2 of 7 images have no caption: 002.webp, 004.jpg; .*captions.default"):
        frozen(folder)


def test_a_default_caption_and_a_prefix(folder):
    make_image_folder(folder, 2)
    (folder / "000.txt").unlink()
    lock = frozen(folder, captions={"default": "a thing", "prefix": "sks, "})
    assert captions(lock) == {"000.png": "sks, a thing", "001.jpg": "sks, picture 1 of a thing"}


def test_no_captions_at_all_and_an_empty_default(folder):
    make_image_folder(folder, 2, captions="None")
    assert set(captions(frozen(folder, captions={"default": ""})).values()) == {""}


def test_an_empty_or_wrong_folder_is_missing_input(folder):
    folder.mkdir()
    (folder / "readme.md").write_text("nothing here")
    with pytest.raises(InputMissing, match=r"no images .* among its 1 objects"):
        frozen(folder)
    make_image_folder(folder, 1)
    with pytest.raises(InputMissing, match=r"no metadata\.jsonl"):
        frozen(folder, format="ImageFolder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: no JSON object"),
        ('{"file_name": "000.png"}\n\n[1]', 'line 3: no "file_name"'),
        ('{"text": "a"}', 'line 1: no "file_name"'),
        ('{"file_name": "000.png", "text": 3}', '"text" is no string'),
        ('{"file_name": "000.png", "text": "\\ud800"}', "surrogate"),
        ('{"file_name": "gone.png", "text": "a"}', "names 1 images that are not there: gone.png"),
        ('{"file_name": "../../etc/passwd.png", "text": "a"}', "not there"),
        ("[" * 100_000, "line 1: no JSON object"),
    ],
)
def test_faults_of_metadata_are_named_by_line(folder, content, message):
    make_image_folder(folder, 1, captions="None")
    (folder / "metadata.jsonl").write_text(content)
    with pytest.raises(BadData, match=message):
        frozen(folder)


def spoil(folder):
    (folder / "000.png").write_bytes(b"")
    (folder / "001.jpg").write_bytes((folder / "001.jpg").read_bytes()[:-400])
    (folder / "003.txt").write_bytes(b"\xff\xfe")
    (folder / "004.txt").write_text("x" * 5000)
    (folder / "pic.gif").write_bytes(b"GIF89a")
    (folder / "pic.txt").write_text("a caption")


def test_bad_images_are_quarantined_with_their_reasons(folder):
    make_image_folder(folder, 20)
    spoil(folder)
    lock = frozen(folder, filters={"maxBadFraction": 0.5})
    assert lock.rejected == {
        "caption is not UTF-8": ("003.png",),
        "caption longer than 4096 characters": ("004.jpg",),
        "damaged or truncated image": ("001.jpg",),
        "no JPEG, PNG or WebP image": ("pic.gif",),
        "the file is empty": ("000.png",),
    }
    assert sum(lock.rejected_counts.values()) == 5
    assert len(lock.images) == 16


def test_too_many_bad_images_are_an_error_that_names_them(folder):
    make_image_folder(folder, 20)
    spoil(folder)
    with pytest.raises(BadData, match=r"5 of 21 images cannot be read, .*000.png \(the file is empty\).*, or raise it"):
        frozen(folder)


def test_the_limit_of_bad_images_is_a_share(folder):
    make_image_folder(folder, 10)
    (folder / "000.png").write_bytes(b"")
    assert len(frozen(folder, filters={"maxBadFraction": 0.1}).images) == 9
    with pytest.raises(BadData):
        frozen(folder, filters={"maxBadFraction": 0.09})


def test_small_and_long_images_are_filtered_not_bad(folder):
    make_image_folder(folder, 6, sizes=((64, 64), (64, 15), (160, 40)))
    lock = frozen(folder)
    assert lock.rejected_counts == {
        "a side below filters.minSide (16)": 2,
        "aspect ratio above filters.maxAspectRatio (3)": 2,
    }
    with pytest.raises(BadData, match="no image is left"):
        frozen(folder, filters={"minSide": 100})


def test_duplicates_are_dropped_or_kept(folder):
    make_image_folder(folder, 3)
    (folder / "copy.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "copy.txt").write_text("the same")
    lock = frozen(folder)
    assert lock.rejected == {"duplicate": ("copy.png",)}
    kept = frozen(folder, filters={"duplicates": "Keep"})
    assert len(kept.images) == 4
    sides = {image.split for image in kept.images if image.key in {"000.png", "copy.png"}}
    assert len(sides) == 1


def test_the_files_of_other_programs_are_passed_over(folder):
    make_image_folder(folder, 1)
    for name in (".DS_Store.png", "._000.png"):
        (folder / name).write_bytes(b"junk")
    assert len(frozen(folder).images) == 1


contents = st.sets(st.integers(0, 10**6).map(str), min_size=1, max_size=60)


@settings(deadline=None)
@given(contents=contents, fraction=st.floats(0, 0.99), seed=st.integers(0, 2**53))
def test_a_split_keeps_something_to_train_on_and_holds_out_what_was_asked(contents, fraction, seed):
    sides = split([list(contents)], fraction, seed=seed)
    held_out = sum(side == "validation" for side in sides.values())
    assert set(sides) == contents
    assert held_out < len(contents)
    if fraction == 0:
        assert held_out == 0
    elif len(contents) > 1:
        assert held_out == min(max(1, round(fraction * len(contents))), len(contents) - 1)


@settings(deadline=None)
@given(contents=contents, seed=st.integers(0, 2**53))
def test_an_image_more_moves_at_most_one_other_across(contents, seed):
    before, after = (split([list(all_of_them)], 0.2, seed=seed) for all_of_them in (contents, contents | {"new"}))
    assert sum(before[content] != after[content] for content in contents) <= 1


def test_orientation_counts_for_the_bucket(folder):
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(folder / "a.jpg", exif=exif)
    (folder / "a.txt").write_text("upright")
    (image,) = frozen(folder).images
    assert (image.width, image.height) == (60, 90)
    assert image.bucket[0] < image.bucket[1]


def test_progress_is_told(folder):
    told = []
    frozen(make_image_folder(folder, 3), report=told.append)
    assert told == ["checking images 3/3"]


def test_one_picture_may_be_asked_for_by_many_at_once(folder, tmp_path):
    (image,) = frozen(make_image_folder(folder, 1)).images
    pictures = Pictures([open_store(folder.as_uri())], tmp_path / "other")
    found = in_parallel(lambda _: pictures.path(image).read_bytes(), range(64), parallel=16)
    assert set(found) == {(folder / "000.png").read_bytes()}


def test_pictures_come_back_and_changes_are_noticed(folder, tmp_path):
    lock = frozen(make_image_folder(folder, 3))
    fresh = Pictures([open_store(folder.as_uri())], tmp_path / "other")
    fresh.fetch(lock)
    assert fresh.path(lock.images[0]).read_bytes() == (folder / "000.png").read_bytes()

    (folder / "000.png").write_bytes((folder / "001.jpg").read_bytes())
    (folder / "002.webp").unlink()
    assert fresh.path(lock.images[0]).exists()
    later = Pictures([open_store(folder.as_uri())], tmp_path / "third")
    with pytest.raises(BadData, match=r"000.png has changed since the dataset was frozen"):
        later.path(lock.images[0])
    with pytest.raises(BadData, match=r"002.webp was there .* and is gone"):
        later.path(lock.images[2])
