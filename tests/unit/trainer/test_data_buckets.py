import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_api.dataset import Dataset
from diffusion_trainer.data.buckets import choose, nearest, table

PORTRAIT, SQUARE, LANDSCAPE = (600, 900), (800, 800), (900, 600)


def dataset(resolution=512, **sections):
    return Dataset.model_validate({"source": "file:///d", "resolution": resolution, **sections})


@settings(deadline=None)
@given(
    resolution=st.integers(8, 256).map(lambda n: 8 * n),
    step=st.sampled_from([8, 16, 32, 64, 128]),
    limit=st.floats(1, 8),
)
def test_shapes_keep_to_area_step_and_ratio_and_have_the_square(resolution, step, limit):
    shapes = table(dataset(resolution, buckets={"step": step}, filters={"maxAspectRatio": limit}))
    assert (resolution, resolution) in shapes
    for width, height in shapes:
        if (width, height) == (resolution, resolution):
            continue
        assert width % step == 0
        assert height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) / min(width, height) <= limit
        assert (height, width) in shapes


def test_the_table_of_512_in_steps_of_64():
    """Worked out by hand: for each width the largest height with at most 512 * 512 pixels, up to 3:1.

    704x320 is no shape, because 768x320 holds all that it holds; 832x256 is beyond 3:1.
    """
    landscape = {(512, 512), (576, 448), (640, 384), (768, 320)}
    assert set(table(dataset())) == landscape | {(h, w) for w, h in landscape}


def test_without_buckets_everything_is_square():
    off = dataset(buckets={"enabled": False})
    assert table(off) == ((512, 512),)
    assert choose([PORTRAIT, LANDSCAPE], off, batch_size=1) == ((512, 512),)


def test_images_go_to_the_nearest_ratio():
    shapes = table(dataset())
    assert nearest(SQUARE, shapes) == (512, 512)
    assert nearest((1000, 1000), shapes) == (512, 512)
    width, height = nearest(LANDSCAPE, shapes)
    assert width > height
    assert nearest(PORTRAIT, shapes) == (height, width)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rare_shapes_give_way_to_the_limit(limit):
    sizes = [SQUARE] * 10 + [PORTRAIT] * 5 + [LANDSCAPE] * 2
    chosen = choose(sizes, dataset(buckets={"maxShapes": limit}), batch_size=1)
    assert len(chosen) == limit
    assert (512, 512) in chosen


def test_a_shape_that_cannot_fill_half_a_batch_is_merged():
    sizes = [SQUARE] * 20 + [LANDSCAPE] * 4
    assert len(choose(sizes, dataset(), batch_size=8)) == 2
    assert choose(sizes, dataset(), batch_size=9) == ((512, 512),)


def test_one_image_is_enough():
    assert len(choose([LANDSCAPE], dataset(), batch_size=64)) == 1


@settings(deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(64, 4000), st.integers(64, 4000)), min_size=1, max_size=30))
def test_the_choice_does_not_depend_on_the_order(sizes):
    assert choose(sizes, dataset(), batch_size=4) == choose(sizes[::-1], dataset(), batch_size=4)
