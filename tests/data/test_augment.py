"""Augmentation keeps image and label aligned, and a crop is a piece of the scaled image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.augment import DRAWS, augment

FILL = (123.675, 116.28, 103.53)
IGNORED = 255


def crops(image, label, seed, crop_size, *, low=0.5, high=2.0, mirror=True, fill=FILL):
    return augment(
        image,
        label,
        np.random.default_rng(seed),
        crop_size=crop_size,
        min_scale=low,
        max_scale=high,
        mirror=mirror,
        fill=fill,
        ignore_index=IGNORED,
    )


def drawn(label):
    """Return the label drawn as an image, 40 gray levels per class."""
    return np.repeat((label * 40)[:, :, None], 3, axis=2)


def smooth(height, width):
    """Return an image whose red is twice the row and whose green is twice the column."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, :, 0] = 2 * np.arange(height)[:, None]
    image[:, :, 1] = 2 * np.arange(width)[None, :]
    return image


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(0, 2**32), st.booleans())
def test_a_label_drawn_into_the_image_still_matches_it_after_any_transform(
    size, crop, seed, mirror
):
    # two halves, so that only pixels next to the border may be mixed
    label = np.zeros(size, dtype=np.uint8)
    label[:, size[1] // 2 :] = 4
    image, found = crops(drawn(label), label, seed, crop, mirror=mirror, fill=(200, 200, 200))
    assert (image.shape, found.shape) == ((*crop, 3), crop)
    assert (image.dtype, found.dtype) == (np.uint8, np.uint8)
    outside = found == IGNORED
    assert (image[outside] == 200).all()
    assert set(np.unique(found)) <= {0, 4, IGNORED}
    nearest = np.where(image[:, :, 0] < 80, 0, 4)
    differs = (nearest != found) & ~outside
    # the border is a column; bilinear and nearest may disagree on at most one column
    assert differs.any(axis=0).sum() <= 1


def test_a_crop_is_a_piece_of_the_whole_resized_image():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (37, 50, 3), dtype=np.uint8)
    label = generator.integers(0, 21, (37, 50), dtype=np.uint8)
    for scale in (0.5, 0.73, 1.0, 1.31, 2.0):
        height, width = round(37 * scale), round(50 * scale)
        whole = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        labels = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
        places = set()
        for seed in range(20):
            found, ids = crops(image, label, seed, (15, 17), low=scale, high=scale, mirror=False)
            pieces = np.lib.stride_tricks.sliding_window_view(np.asarray(labels), (15, 17))
            matches = np.argwhere((pieces == ids).mean(axis=(2, 3)) > 0.9)
            assert len(matches) == 1
            top, left = matches[0]
            places.add((int(top), int(left)))
            piece = np.asarray(whole)[top : top + 15, left : left + 17].astype(int)
            assert np.abs(piece - found).max() <= 1
        assert len(places) > 5


def test_crops_at_scale_one_are_exact_and_half_of_them_mirrored():
    image, label = smooth(20, 30), np.arange(600, dtype=np.uint16).reshape(20, 30) % 251
    label = label.astype(np.uint8)
    mirrored = 0
    for seed in range(200):
        found, ids = crops(image, label, seed, (8, 9), low=1, high=1)
        top, left = found[0, :, 0].min() // 2, found[0, :, 1].min() // 2
        turn = -1 if found[0, 0, 1] > found[0, -1, 1] else 1
        mirrored += turn == -1
        assert (found == image[top : top + 8, left : left + 9][:, ::turn]).all()
        assert (ids == label[top : top + 8, left : left + 9][:, ::turn]).all()
    assert 70 < mirrored < 130


@pytest.mark.parametrize("size", [(9, 11), (3, 2), (3, 11)])
def test_every_crop_position_is_equally_likely_corners_included(size):
    """Crop inside the image, image inside the crop, and one axis of each."""
    crop = (6, 7)
    label = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    image = drawn(label * 0)
    ways = [abs(size[axis] - crop[axis]) + 1 for axis in (0, 1)]
    seen = np.zeros(ways, dtype=int)
    for seed in range(200 * ways[0] * ways[1]):
        _, ids = crops(image, label, seed, crop, low=1, high=1, mirror=False)
        row, column = np.argwhere(ids != IGNORED)[0]
        y, x = divmod(int(ids[row, column]), size[1])
        seen[abs(row - y), abs(column - x)] += 1
    assert seen.min() > 140
    assert seen.max() < 260


def test_a_constant_image_stays_constant():
    image, label = np.full((11, 13, 3), 77, np.uint8), np.full((11, 13), 5, np.uint8)
    for seed in range(30):
        found, ids = crops(image, label, seed, (16, 9), fill=(1, 2, 3))
        inside = ids == 5
        assert (found[inside] == 77).all()
        assert (found[~inside] == (1, 2, 3)).all()
        assert (ids[~inside] == IGNORED).all()


def test_scales_are_uniform_between_the_limits():
    label = np.ones((100, 100), np.uint8)
    heights = [
        (crops(drawn(label), label, seed, (200, 200))[1] == 1).any(axis=1).sum()
        for seed in range(300)
    ]
    assert min(heights) >= 50
    assert max(heights) <= 200
    thirds = np.histogram(heights, bins=3, range=(50, 200))[0]
    assert thirds.min() > 70


def test_padding_is_the_fill_color_rounded():
    label = np.zeros((4, 4), np.uint8)
    image, ids = crops(drawn(label), label, 0, (9, 9), low=1, high=1)
    assert (image[ids == IGNORED] == (124, 116, 104)).all()


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("crop", [(3, 3), (90, 90)])
def test_equal_generators_give_equal_bytes_and_advance_equally(mirror, crop):
    image, label = smooth(20, 30), np.zeros((20, 30), np.uint8)
    first, again, counted = (np.random.default_rng(5) for _ in range(3))
    values = {"crop_size": crop, "min_scale": 0.5, "max_scale": 2.0, "mirror": mirror}
    values |= {"fill": FILL, "ignore_index": IGNORED}
    for one, other in zip(
        augment(image, label, first, **values),
        augment(image, label, again, **values),
        strict=True,
    ):
        assert one.tobytes() == other.tobytes()
    counted.random(DRAWS)
    assert first.random() == counted.random()


def test_inputs_are_not_modified_and_outputs_are_copies():
    image, label = smooth(20, 30), np.zeros((20, 30), np.uint8)
    for seed in range(4):
        found, ids = crops(image, label, seed, (20, 30), low=1, high=1)
        found[:], ids[:] = 9, 9
    assert (image == smooth(20, 30)).all()
    assert not label.any()


def test_a_label_of_another_size_than_the_image_is_refused():
    with pytest.raises(ValueError, match=r"image is \(4, 5, 3\), but label is \(5, 4\); give"):
        crops(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), np.uint8), 0, (3, 3))
