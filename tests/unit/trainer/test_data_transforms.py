import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_api.dataset import Augmentation
from diffusion_trainer.data.lock import LockedImage
from diffusion_trainer.data.transforms import Variant, Variants, cover, geometry, transform


def image(width, height, *, bucket=(64, 64), split="train", content="a"):
    return LockedImage(id=content, key="a.png", width=width, height=height, caption="", bucket=bucket, split=split)


def gradient(width, height):
    """Red is the column, green the row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def values(pixels):
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (64, 100), (65, 64), (1000, 333), (30, 20), (63, 64)])
@pytest.mark.parametrize("bucket", [(64, 64), (80, 48), (48, 80)])
def test_the_scaled_image_covers_its_bucket_tightly(size, bucket):
    scaled = cover(image(*size, bucket=bucket))
    assert scaled[0] >= bucket[0]
    assert scaled[1] >= bucket[1]
    assert scaled[0] == bucket[0] or scaled[1] == bucket[1]


def test_a_crop_without_scaling_is_exact():
    pixels, told = transform(gradient(100, 64), Variant(scaled=(100, 64), left=10, top=0, flip=False), (64, 64))
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 64, 64)
    assert np.array_equal(values(pixels), np.asarray(gradient(100, 64))[:, 10:74])
    assert (told.original, told.crop, told.target) == ((100, 64), (10, 0), (64, 64))


def test_black_and_white_are_the_ends_of_the_range():
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 32, 64))
    pixels, _ = transform(picture, Variant((64, 64), 0, 0, flip=False), (64, 64))
    assert pixels[:, 0, 0].tolist() == [1, 1, 1]
    assert pixels[:, 0, 63].tolist() == [-1, -1, -1]


def test_a_flip_mirrors_the_pixels_and_the_crop_that_is_told():
    """diffusers #6234: mirrored pictures were told the crop of the picture that was not mirrored."""
    plain = transform(gradient(100, 64), Variant((100, 64), 10, 0, flip=False), (64, 64))
    flipped = transform(gradient(100, 64), Variant((100, 64), 10, 0, flip=True), (64, 64))
    assert torch.equal(flipped[0], plain[0].flip(2))
    assert flipped[1].crop == (100 - 64 - 10, 0)
    assert flipped[1].original == plain[1].original


def test_geometry_is_told_by_height_before_width():
    """SDXL's time ids: original height and width, top and left, height and width."""
    told = geometry((100, 70), Variant((96, 67), 12, 3, flip=False), (80, 64)).numbers()
    assert told.tolist() == [70, 100, 3, 12, 64, 80]
    assert told.dtype == torch.float32


def test_scaling_down_averages_areas():
    """Lines of one pixel, scaled to a quarter: point sampling would give black, white or stripes."""
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels, _ = transform(Image.fromarray(stripes), Variant((64, 64), 0, 0, flip=False), (64, 64))
    assert pixels[:, 4:-4, 4:-4].abs().max() < 0.02


def test_variants_are_a_function_of_seed_image_and_number():
    augmentation = Augmentation(crop="Random", variants_per_image=4)
    first = Variants(augmentation, seed=1).of(image(200, 64))
    assert first == Variants(augmentation, seed=1).of(image(200, 64))
    assert first != Variants(augmentation, seed=2).of(image(200, 64))
    assert first != Variants(augmentation, seed=1).of(image(200, 64, content="b"))
    assert len(set(first)) > 1
    assert first[:2] == Variants(Augmentation(crop="Random", variants_per_image=2), seed=1).of(image(200, 64))


@pytest.mark.parametrize(("probability", "low", "high"), [(0, 0, 0), (0.5, 0.4, 0.6), (0.1, 0.05, 0.15), (1, 1, 1)])
def test_flips_come_as_often_as_they_should(probability, low, high):
    variants = Variants(Augmentation(horizontal_flip=probability, variants_per_image=1), seed=3)
    share = np.mean([variants.of(image(64, 64, content=str(i)))[0].flip for i in range(1000)])
    assert low <= share <= high


def test_random_crops_use_the_whole_picture_and_stay_inside():
    variants = Variants(Augmentation(crop="Random", variants_per_image=16), seed=0)
    lefts = [v.left for i in range(50) for v in variants.of(image(164, 64, content=str(i)))]
    assert min(lefts) >= 0
    assert max(lefts) <= 100
    assert min(lefts) < 5
    assert max(lefts) > 95


def test_centre_crops_are_central():
    variants = Variants(Augmentation(horizontal_flip=0, variants_per_image=2), seed=0).of(image(164, 64))
    assert {v.left for v in variants} == {50}
    assert len(set(variants)) == 1


def test_a_held_out_image_has_one_plain_variant():
    augmentation = Augmentation(crop="Random", horizontal_flip=1, variants_per_image=4)
    assert Variants(augmentation, seed=0).of(image(164, 64, split="validation")) == (
        Variant((164, 64), 50, 0, flip=False),
    )
