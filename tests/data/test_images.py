"""Decoded images are compared pixel by pixel with what their format's specification says."""

import io
import pickle
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data.images import IMAGE_ERROR_KINDS, ImageError, decode


def png(width, height, bits, color_type, rows, extra=b""):
    """Return a PNG of packed `rows`, with `extra` chunks between header and pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tiff(width, height, bits, pixels):
    """Return a little-endian gray TIFF of one strip."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(pixels))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(height, width, bands=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)


def kind_of(data, **limits):
    with pytest.raises(ImageError) as caught:
        decode(data, **limits)
    message = str(caught.value)
    assert message.isprintable()
    assert 0 < len(message) <= 300
    assert caught.value.kind in IMAGE_ERROR_KINDS
    return caught.value.kind


# EXIF 2.3, tag 0x0112: the visual side of the stored row 0, then of column 0
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", SIDES)
def test_every_exif_orientation_is_turned_upright_as_the_standard_says(orientation):
    stored = noise(5, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(saved(Image.fromarray(stored), exif=exif))
    assert found.flags.c_contiguous
    height, width = found.shape[:2]
    for i in range(5):
        for j in range(7):
            place = dict(zip(SIDES[orientation], (i, j), strict=True))
            y = place["top"] if "top" in place else height - 1 - place["bottom"]
            x = place["left"] if "left" in place else width - 1 - place["right"]
            assert found[y, x].tolist() == stored[i, j].tolist()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_image_converted_in_strips_equals_the_whole(orientation):
    image = Image.fromarray(noise(1051, 2113))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, "BMP") if orientation == 1 else saved(image, compress_level=0, exif=exif)
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data), np.asarray(whole))


@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_rgb_is_unchanged(height, width, rng):
    rows = [rng.randbytes(3 * width) for _ in range(height)]
    found = decode(png(width, height, 8, 2, rows))
    assert found.shape == (height, width, 3)
    assert found.tobytes() == b"".join(rows)


def test_16_bit_gray_is_scaled_from_65535():
    values = [0, 128, 129, 257, 4095, 32768, 65535]
    found = decode(png(7, 1, 16, 0, [struct.pack(">7H", *values)]))
    assert found[0].tolist() == [[round(v / 257)] * 3 for v in values]


def test_12_bit_gray_is_scaled_from_4095():
    # two samples of 12 bits in three bytes: 0xFFF, 0x000, 0x800, 0x400
    found = decode(tiff(4, 1, 12, bytes.fromhex("fff000800400")))
    assert found[0, :, 0].tolist() == [255, 0, 128, 64]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.25, 1.0, np.nan], [0, 64, 255, 0]),
        ([0.0, 2.0, 255.0, 9.4], [0, 2, 255, 9]),
        ([-1.0, 0.0, 1.0, np.inf], [0, 128, 255, 255]),
        ([0.0, 500.0, 1000.0, -np.inf], [0, 128, 255, 0]),
        ([-3.0, -3.0, -3.0, -3.0], [0, 0, 0, 0]),
        ([np.nan, np.nan, np.nan, np.nan], [0, 0, 0, 0]),
    ],
)
def test_floats_are_0_to_1_or_0_to_255_or_else_stretched(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert decode(saved(image, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 257, 65535], [0, 1, 255]), ([-100, 0, 100], [0, 128, 255]), ([0, 1, 2**20], [0, 0, 255])],
)
def test_32_bit_integers_are_16_bit_or_else_stretched(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert decode(saved(image, "TIFF"))[0, :, 0].tolist() == expected


def over_white(red, green, blue, alpha):
    return [round((c * alpha + 255 * (255 - alpha)) / 255) for c in (red, green, blue)]


def test_transparency_is_shown_on_white():
    rgba = noise(6, 5, bands=4)
    found = decode(png(5, 6, 8, 6, [row.tobytes() for row in rgba]))
    assert found.tolist() == [[over_white(*pixel) for pixel in row] for row in rgba.tolist()]


def test_only_the_transparent_palette_entry_becomes_white():
    colors = [(10, 20, 30), (200, 0, 0), (0, 0, 250)]
    extra = chunk(b"PLTE", bytes(sum(colors, ()))) + chunk(b"tRNS", bytes([0, 255, 51]))
    found = decode(png(3, 1, 8, 3, [bytes([0, 1, 2])], extra))
    assert found[0].tolist() == [[255, 255, 255], [200, 0, 0], over_white(0, 0, 250, 51)]


@pytest.mark.parametrize(
    ("color_type", "trns", "row", "expected"),
    [
        (0, struct.pack(">H", 7), bytes([7, 8]), [[255] * 3, [8] * 3]),
        (2, struct.pack(">3H", 1, 2, 3), bytes([1, 2, 3, 1, 2, 4]), [[255] * 3, [1, 2, 4]]),
    ],
)
def test_a_color_declared_transparent_is_white(color_type, trns, row, expected):
    data = png(2, 1, 8, color_type, [row], chunk(b"tRNS", trns))
    assert decode(data)[0].tolist() == expected


def test_one_bit_is_black_and_white():
    assert decode(png(9, 1, 1, 0, [bytes([0b10110000, 0x80])]))[0, :, 1].tolist() == [
        *(255, 0, 255, 255, 0, 0, 0, 0, 255)
    ]


def test_cmyk_is_converted_as_ink_on_white_paper():
    inks = noise(4, 3, bands=4)
    found = decode(saved(Image.fromarray(inks, "CMYK"), "TIFF")).astype(int)
    paper = [
        [[(255 - c) * (255 - k) / 255 for c in p[:3]] for p in r for k in p[3:]]
        for r in inks.tolist()
    ]
    assert np.abs(found - np.array(paper)).max() <= 1


def test_neutral_lab_is_gray_from_black_to_white():
    lab = np.zeros((1, 5, 3), dtype=np.uint8)
    lab[0, :, 0] = [0, 64, 128, 192, 255]
    found = decode(saved(Image.fromarray(lab, "LAB"), "TIFF"))[0].astype(int)
    assert np.ptp(found, axis=1).max() <= 1
    assert (np.diff(found[:, 0]) > 0).all()
    assert found[0, 0] <= 1
    assert found[-1, 0] >= 254


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_only_the_first_frame_is_decoded(form):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    found = decode(saved(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert (found == (255, 0, 0)).all()


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_lossy_formats_reproduce_a_flat_color(form):
    found = decode(saved(Image.new("RGB", (33, 17), (200, 40, 90)), form)).astype(int)
    assert found.shape == (17, 33, 3)
    assert np.abs(found - (200, 40, 90)).max() <= 6


def test_the_pixel_limit_is_exact():
    data = saved(Image.new("RGB", (7, 5)))
    assert decode(data, max_pixels=35).shape == (5, 7, 3)
    assert kind_of(data, max_pixels=34) == "too_large"
    with pytest.raises(ValueError, match="max_pixels 0: must be at least 1"):
        decode(data, max_pixels=0)


@pytest.mark.parametrize("side", [11_000, 13_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    # it has no pixel data: decoding it would raise `truncated`
    assert kind_of(png(side, side, 8, 2, [])) == "too_large"


def test_a_decompression_bomb_inside_an_icon_is_refused():
    inner = saved(Image.new("RGBA", (300, 300)))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + entry + inner
    assert decode(icon, max_pixels=90_000).shape == (300, 300, 3)
    assert kind_of(icon, max_pixels=10_000) == "too_large"


JPEG = saved(Image.fromarray(noise(40, 56)), "JPEG")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"<html>404 Not Found</html>", "not_an_image"),
        (JPEG[:700], "truncated"),
        (saved(Image.fromarray(noise(40, 56)))[:3000], "truncated"),
        (saved(Image.fromarray(noise(40, 56)), "BMP")[:-1], "truncated"),
        (JPEG[:4], "corrupt"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "corrupt"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unsupported"),
        (b"%PDF-1.7\n", "unsupported"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported"),
        (png(2, 2, 8, 2, [])[:-30] + chunk(b"IDAT", b"no zlib") + chunk(b"IEND", b""), "corrupt"),
    ],
)
def test_each_failure_has_its_kind(data, kind):
    assert kind_of(data) == kind


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(), SyntaxError("x"), ValueError("x"), struct.error("x"), zlib.error("x")),
        *(EOFError(), OverflowError("x"), TypeError("x"), IndexError("x"), KeyError("x")),
        *(RecursionError("x"), AssertionError(), NotImplementedError("x"), ImportError("x")),
        OSError("bell \a, escape \x1b[31m,\nline\u2028and \ud800 surrogate " + "x" * 1000),
    ],
)
def test_any_error_of_pillow_becomes_an_image_error_of_one_line(monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    kind_of(png(2, 1, 8, 0, [b"ab"]))


def test_a_memory_error_is_not_blamed_on_the_image(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(MemoryError):
        decode(png(2, 1, 8, 0, [b"ab"]))


def test_an_image_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(ImageError("corrupt", "why")))
    assert (error.kind, str(error)) == ("corrupt", "why")


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"]
)
def test_broken_exif_data_is_ignored(exif):
    assert decode(saved(Image.new("RGB", (7, 5)), "JPEG", exif=exif)).shape == (5, 7, 3)


def test_metadata_that_cannot_be_parsed_is_ignored(monkeypatch):
    def fail(self):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert decode(JPEG).shape == (40, 56, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(5, 7)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(stored), exif=exif)), stored)


def test_pillows_settings_are_restored_and_no_warning_is_issued(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_345)
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for data in (png(13_000, 13_000, 8, 2, []), b"II*\0\x08\0\0\0\xff\xff" * 9, JPEG[:600]):
            kind_of(data)
        decode(saved(Image.new("P", (4, 4)), transparency=b"\0\1"))
    assert not warned
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


STARTS = (b"", b"\xff\xd8\xff", b"GIF89a", b"II*\0\x08\0\0\0", b"BM", b"8BPS\0\1", b"\0\0\1\0\1\0")


def test_random_bytes_give_an_image_or_an_image_error():
    rng = random.Random(0)
    for _ in range(400):
        check(rng.choice(STARTS) + rng.randbytes(rng.randrange(1, 600)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "TGA"])
def test_corrupt_images_give_an_image_or_an_image_error(form):
    rng = random.Random(form)
    whole = saved(Image.fromarray(noise(40, 56)), form)
    for _ in range(60):
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 4)):
            if damaged:
                damaged[rng.randrange(min(len(damaged), 300))] ^= 1 << rng.randrange(8)
        check(bytes(damaged))


def check(data):
    try:
        found = decode(data, max_pixels=1_000_000)
    except ImageError:
        kind_of(data, max_pixels=1_000_000)
    else:
        assert found.dtype == np.uint8
        assert found.ndim == 3
