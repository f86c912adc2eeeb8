"""Masks and labels, from files written byte by byte so that no encoder interprets the values."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipeline.data import images, masks
from pipeline.data.labels import CAMVID, CITYSCAPES, CITYSCAPES_TRAIN_IDS, VOC, Classes
from pipeline.data.masks import LabelError, decode_label


def png(bits, color_type, rows, width, extra=b""):
    """Return a PNG of packed `rows`, with `extra` chunks between header and pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return start + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def unpack_gray(data):
    """Return the pixels of an 8-bit gray PNG, decoded as its specification says."""
    parts, at = {}, 8
    while at < len(data):
        (size,), name = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        parts[name] = parts.get(name, b"") + data[at + 8 : at + 8 + size]
        at += 12 + size
    width, height, bits, color_type = struct.unpack_from(">IIBB", parts[b"IHDR"])
    assert (bits, color_type) == (8, 0)
    lines = zlib.decompress(parts[b"IDAT"])
    rows, above = [], [0] * width
    for y in range(height):
        how, *row = lines[y * (width + 1) : (y + 1) * (width + 1)]
        for x in range(width):
            guess = {0: 0, 1: row[x - 1] if x else 0, 2: above[x]}[how]
            row[x] = (row[x] + guess) % 256
        rows.append(row)
        above = row
    return rows


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


any_mask = arrays.arrays(
    np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 255)
)


@given(any_mask)
def test_a_mask_survives_encoding(mask):
    found = masks.decode(masks.encode(mask))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, mask)


def test_a_mask_is_encoded_as_a_gray_png_of_class_ids():
    mask = np.random.default_rng(0).integers(0, 21, (6, 7), dtype=np.uint8)
    assert unpack_gray(masks.encode(mask)) == mask.tolist()


def test_a_mask_that_is_not_contiguous_in_memory_survives_encoding():
    mask = np.arange(35, dtype=np.uint8).reshape(5, 7).T[::-1]
    np.testing.assert_array_equal(masks.decode(masks.encode(mask)), mask)


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2)), np.zeros(4, np.uint8), np.zeros((0, 3), np.uint8)]
)
def test_arrays_that_are_not_masks_are_not_encoded(mask):
    with pytest.raises(ValueError, match=r"it must be uint8 \(h, w\)"):
        masks.encode(mask)


@pytest.mark.parametrize("data", [b"", b"x", png(8, 2, [bytes(3)], 1), png(4, 0, [b"\x12"], 2)])
def test_files_that_are_not_masks_are_not_decoded(data):
    with pytest.raises(images.ImageError):
        masks.decode(data)


def test_a_palette_label_gives_its_indexes_not_its_colors():
    colors = chunk(b"PLTE", bytes(range(256)) * 3) + chunk(b"tRNS", bytes([0, 9]))
    data = png(8, 3, [bytes([0, 1, 20]), bytes([255, 7, 7])], 3, colors)
    assert decode_label(data, VOC).tolist() == [[0, 1, 20], [255, 7, 7]]


@pytest.mark.parametrize(
    ("bits", "row"), [(1, [0b01100000]), (2, [0b00010110]), (4, [0x01, 0x3F]), (8, [0, 3, 2, 15])]
)
def test_gray_labels_of_any_bit_depth_give_the_stored_values(bits, row):
    digits = "".join(f"{byte:08b}" for byte in row)
    expected = [int(digits[i * bits : (i + 1) * bits], 2) for i in range(4)]
    assert decode_label(png(bits, 0, [bytes(row)], 4), VOC).tolist() == [expected]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_packed_palette_labels_give_the_stored_indexes(bits):
    colors = chunk(b"PLTE", bytes(3 * 2**bits))
    expected = [0b01101100 >> (8 - bits * (i + 1)) & (2**bits - 1) for i in range(2)]
    assert decode_label(png(bits, 3, [bytes([0b01101100])], 2, colors), VOC).tolist() == [expected]


def test_16_bit_gray_labels_are_not_scaled():
    assert decode_label(png(16, 0, [struct.pack(">3H", 0, 20, 255)], 3), VOC).tolist() == [
        [0, 20, 255]
    ]
    with pytest.raises(LabelError, match="holds class 5120"):
        decode_label(png(16, 0, [struct.pack(">2H", 0, 20 << 8)], 2), VOC)


def test_32_bit_labels_give_ids_or_an_error():
    wide = Image.fromarray(np.array([[0, 20, 255]], dtype=np.int32))
    assert decode_label(saved(wide, "TIFF"), VOC).tolist() == [[0, 20, 255]]
    with pytest.raises(LabelError, match="holds class -1"):
        decode_label(saved(Image.fromarray(np.array([[-1]], dtype=np.int32)), "TIFF"), VOC)


@pytest.mark.parametrize("color_type", [2, 6])
def test_rgb_labels_are_looked_up_in_the_palette_with_the_border_ignored(color_type):
    opaque = b"\xff" if color_type == 6 else b""
    colors = [(192, 128, 128), (0, 0, 0), (224, 224, 192), (0, 64, 128)]
    data = png(8, color_type, [b"".join(bytes(c) + opaque for c in colors)], 4)
    assert decode_label(data, VOC).tolist() == [[15, 0, 255, 20]]


@given(st.lists(st.sampled_from(range(CITYSCAPES.num_classes)), min_size=1, max_size=9))
def test_every_palette_color_maps_to_its_class(ids):
    row = b"".join(bytes(CITYSCAPES.palette[i]) for i in ids)
    assert decode_label(png(8, 2, [row], len(ids)), CITYSCAPES).tolist() == [ids]


def test_the_border_color_is_a_class_if_the_palette_has_it():
    own = Classes(names=("a", "b"), palette=((224, 224, 192), (1, 1, 1)))
    assert decode_label(png(8, 2, [bytes([224, 224, 192])], 1), own).tolist() == [[0]]


@pytest.mark.parametrize(
    ("data", "classes", "message"),
    [
        (png(8, 2, [bytes([1, 2, 3])], 1), VOC, r"color \(1, 2, 3\), which is not a class"),
        (png(16, 2, [bytes(6)], 1), VOC, "16-bit colors"),
        (png(16, 4, [bytes([0, 5, 255, 255])], 1), VOC, "16-bit colors"),
        (png(8, 6, [bytes([0, 0, 0, 254])], 1), VOC, "transparent pixels"),
        (png(8, 4, [bytes([3, 0])], 1), VOC, "transparent pixels"),
        (png(8, 0, [bytes([37])], 1), VOC, r"class 37, but num_classes is 21; .*\(255\)"),
        (png(8, 0, [bytes([255])], 1), CAMVID, r"class 255, but num_classes is 11; .*\(11\)"),
        (png(8, 0, [b"\0"], 1)[:40], VOC, "cannot be read"),
        (b"", VOC, "no bytes"),
        (saved(Image.new("L", (8, 8)), "JPEG"), VOC, "JPEG is not read; convert it to PNG"),
        (b"P5 1 1 20 \x01", VOC, "cannot be read as PNG"),
        (saved(Image.new("F", (2, 2)), "TIFF"), VOC, "mode F"),
        (saved(Image.new("CMYK", (2, 2)), "TIFF"), VOC, "mode CMYK"),
        (
            png(8, 2, [bytes(3)], 1),
            Classes(names=("a", "b"), palette=((0, 0, 0), (0, 0, 0))),
            "duplicate colors",
        ),
    ],
)
def test_ambiguous_label_files_are_refused_with_a_reason(data, classes, message):
    with pytest.raises(LabelError, match=message) as caught:
        decode_label(data, classes)
    assert str(caught.value).isprintable()


def test_gray_labels_with_an_opaque_alpha_channel_are_read():
    assert decode_label(png(8, 4, [bytes([3, 255, 20, 255])], 2), VOC).tolist() == [[3, 20]]


def test_camvid_ignores_the_value_11():
    assert decode_label(png(8, 0, [bytes([10, 11])], 2), CAMVID).tolist() == [[10, 11]]


def test_a_lookup_maps_cityscapes_label_ids_to_train_ids():
    data = png(8, 0, [bytes([7, 33, 0, 255, 26])], 5)
    found = decode_label(data, CITYSCAPES, lookup=CITYSCAPES_TRAIN_IDS)
    assert found.tolist() == [[0, 18, 255, 255, 13]]
    with pytest.raises(ValueError, match=r"lookup is int64 \(34,\)"):
        decode_label(data, CITYSCAPES, lookup=np.zeros(34, dtype=np.int64))


def test_a_label_of_another_size_is_refused_naming_both_sizes():
    data = png(8, 0, [bytes(7)] * 5, 7)
    assert decode_label(data, VOC, size=(5, 7)).shape == (5, 7)
    with pytest.raises(LabelError, match="label is 5 x 7, but its image is 7 x 5"):
        decode_label(data, VOC, size=(7, 5))


def test_a_label_over_the_pixel_limit_is_refused():
    with pytest.raises(LabelError, match="over max_pixels, 34"):
        decode_label(png(8, 0, [bytes(7)] * 5, 7), VOC, max_pixels=34)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_applies_to_image_and_label_alike(orientation):
    label = np.random.default_rng(1).integers(0, 21, (5, 7), dtype=np.uint8)
    image = np.repeat(label[:, :, None], 3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_label(saved(Image.fromarray(label), exif=exif), VOC)
    assert turned.flags.c_contiguous
    shown = images.decode(saved(Image.fromarray(image), exif=exif))
    np.testing.assert_array_equal(shown[:, :, 0], turned)


def test_corrupt_labels_give_ids_or_a_label_error():
    rng = np.random.default_rng(2)
    whole = png(8, 0, [bytes(range(21))] * 4, 21)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(LabelError):
            found = decode_label(bytes(damaged), VOC, max_pixels=10_000)
            assert set(np.unique(found)) <= {*range(21), 255}


def test_an_overlay_blends_colors_and_leaves_ignored_pixels():
    image = np.full((3, 5, 3), 100, dtype=np.uint8)
    mask = np.full((3, 5), 15, dtype=np.uint8)
    mask[:, 3] = 255
    found = masks.overlay(image, mask, VOC, alpha=0.5)
    assert found[1, 1].tolist() == [146, 114, 114]  # person is (192, 128, 128)
    assert found[:, 3].tolist() == [[100, 100, 100]] * 3
    assert found[0, 4].tolist() == [192, 128, 128]  # a border shows the pure color


def test_an_overlay_with_alpha_zero_changes_only_borders():
    image = np.random.default_rng(3).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    mask = np.full((4, 6), 2, dtype=np.uint8)
    np.testing.assert_array_equal(masks.overlay(image, mask, VOC, alpha=0), image)
    assert (masks.overlay(image, mask, VOC, alpha=1) == VOC.palette[2]).all()


def test_an_overlay_refuses_mismatched_arguments():
    image, mask = np.zeros((4, 6, 3), dtype=np.uint8), np.zeros((4, 6), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"image is \(4, 6, 3\), but the mask is \(6, 4\)"):
        masks.overlay(image, mask.T, VOC)
    with pytest.raises(ValueError, match="alpha 2: must be between"):
        masks.overlay(image, mask, VOC, alpha=2)
    with pytest.raises(ValueError, match="mask holds class 21"):
        masks.overlay(image, mask + 21, VOC)
