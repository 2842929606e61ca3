from dataclasses import replace

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


@pytest.mark.parametrize("degrees", [10.0, -33.0, 45.0])
@pytest.mark.parametrize("bucket", [(64, 64), (80, 48)])
def test_a_turn_is_about_the_middle_and_against_the_clock(degrees, bucket):
    """Of a gradient, every pixel says where it came from; computed here by the matrix of the rotation."""
    whole = image(200, 180, bucket=bucket)
    plain = Variant(scaled=(200, 180), left=60, top=60, flip=False)
    turned, _ = transform(gradient(200, 180), replace(plain, degrees=degrees), whole.bucket)
    width, height = bucket
    u, v = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    middle = 60 + (width - 1) / 2, 60 + (height - 1) / 2
    assert np.abs(values(turned)[..., 0] - (middle[0] + u * cosine - v * sine)).max() <= 1
    assert np.abs(values(turned)[..., 1] - (middle[1] + u * sine + v * cosine)).max() <= 1


@pytest.mark.parametrize("size", [(64, 64), (200, 64), (64, 300), (1000, 900)])
def test_turned_images_have_no_empty_corners_and_stay_within_the_picture(size):
    augmentation = Augmentation(crop="Random", rotate_degrees=45, variants_per_image=16)
    white = Image.new("RGB", size, (255, 255, 255))
    drawn = Variants(augmentation, seed=4).of(image(*size))
    assert len({variant.degrees for variant in drawn}) == 16
    assert all(abs(variant.degrees) <= 45 for variant in drawn)
    for variant in drawn:
        pixels, _ = transform(white, variant, (64, 64))
        assert (pixels == 1).all()


def test_an_upright_variant_is_not_touched_by_what_others_do():
    """Turning and colours are drawn after flip and crop, so that these stay as they were."""
    before = Variants(Augmentation(crop="Random", variants_per_image=16), seed=1).of(image(200, 64))
    both = {"rotate_degrees": 20, "color_jitter": 0.3}
    after = Variants(Augmentation(crop="Random", variants_per_image=16, **both), seed=1).of(image(200, 64))
    assert [variant.flip for variant in before] == [variant.flip for variant in after]
    assert all(variant.degrees == 0 and variant.colours == (1, 1, 1) for variant in before)


def test_colours_are_multiplied_by_factors_within_their_bounds():
    drawn = Variants(Augmentation(color_jitter=0.2, variants_per_image=16), seed=1).of(image(64, 64))
    factors = np.array([variant.colours for variant in drawn])
    assert factors.min() >= 0.8
    assert factors.max() <= 1.2
    assert factors.std(axis=0).min() > 0.05
    grey = Image.new("RGB", (64, 64), (100, 100, 100))
    pixels, _ = transform(grey, replace(drawn[0], flip=False, colours=(1.2, 1.0, 1.0)), (64, 64))
    assert set(values(pixels).ravel()) == {120}
    red, _ = transform(Image.new("RGB", (64, 64), (200, 0, 0)), replace(drawn[0], colours=(1, 1, 0)), (64, 64))
    assert set(values(red).ravel()) == {60}  # without saturation: 0.299 of the red


def test_a_held_out_image_is_neither_turned_nor_coloured():
    augmentation = Augmentation(rotate_degrees=45, color_jitter=1, variants_per_image=4)
    (plain,) = Variants(augmentation, seed=0).of(image(64, 64, split="validation"))
    assert (plain.degrees, plain.colours) == (0, (1, 1, 1))
