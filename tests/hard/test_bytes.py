"""Malformed bytes decode to an image within the limits, or to one typed error, in bounded time.

`HARD_IMAGES=FOLDER` names a folder of files that other libraries failed on, with a
`manifest.csv` (path, w, h, exif_orientation, load) of another reader's results.
"""

from __future__ import annotations

import csv
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline.bulk.worker.decode import DecodeError, DecodeLimits, DecoderPool
from pipeline.data.images import IMAGE_ERROR_KINDS, ImageError, Pixels, decode
from pipeline.data.labels import VOC
from tests.small_images import small_image

MAX_PIXELS = 1_000_000
HANG_S = 30
"""CPU seconds after which an image of a few KB counts as hung; it takes a few milliseconds."""

COUNT = 10_000

# random bytes get further into a parser behind a valid signature
STARTS = [
    *(b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*"),
    *(b"RIFF\0\0\1\0WEBPVP8 ", b"RIFF\0\0\1\0WEBPVP8L", b"8BPS\0\1", b"DDS ", b"qoif", b"P6\n"),
    *(b"\0\0\1\0\1\0", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ", b"icns", b"\x0a\5\1\x08"),
    *(b"\x01\xda", b"\x59\xa6\x6a\x95", b"\0\0\0\x1cftypavif", b"%!PS", b"<svg"),
]


@contextmanager
def never_for_long(what: str) -> Iterator[None]:
    """Fail, naming `what`, if the body takes more CPU time than any small image needs."""

    def hung(*_: object) -> None:
        pytest.fail(f"{what} hangs")

    before = signal.signal(signal.SIGVTALRM, hung)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def outcome(data: bytes, what: str) -> str:
    """Decode and check the result; return `ok` or the kind of its error."""
    with never_for_long(what):
        found = attempt(data)
    if isinstance(found, ImageError):
        check_error(found.kind, str(found), what)
        return found.kind
    assert found.dtype == np.uint8, what
    assert found.ndim == 3, what
    assert found.shape[2] == 3, what
    assert 0 < found.shape[0] * found.shape[1] <= MAX_PIXELS, what
    return "ok"


def attempt(data: bytes) -> Pixels | ImageError:
    try:
        return decode(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        return error


def check_error(kind: str, message: str, what: object) -> None:
    assert kind in IMAGE_ERROR_KINDS, what
    assert 0 < len(message) <= 300, what
    assert message.isprintable(), what


def test_random_bytes_are_an_image_or_a_typed_error() -> None:
    found = set()
    for seed in range(COUNT):
        draw = random.Random(seed)
        data = draw.choice(STARTS) + draw.randbytes(draw.choice([0, 1, 7, 60, 900, 20_000]))
        found.add(outcome(data, f"seed {seed}"))
    assert {"not_an_image", "corrupt", "truncated", "unsupported", "empty"} <= found


@pytest.mark.slow
def test_jpegs_with_flipped_bits_are_an_image_or_a_typed_error() -> None:
    found = set()
    for seed in range(COUNT):
        draw = random.Random(seed)
        damaged = bytearray(small_image(3 * draw.randrange(8) + 1)[1])
        assert damaged.startswith(b"\xff\xd8\xff")
        # its tables are at the start: errors there have the largest effect
        reach = draw.choice([20, 700, len(damaged)])
        for _ in range(draw.choice([1, 1, 2, 8, 64])):
            damaged[draw.randrange(reach)] ^= 1 << draw.randrange(8)
        found.add(outcome(bytes(damaged), f"seed {seed}"))
    assert {"ok", "corrupt", "not_an_image"} <= found


@pytest.fixture(scope="module")
def hard_images() -> Path:
    if "HARD_IMAGES" not in os.environ:
        pytest.skip("set HARD_IMAGES to a folder of hard images to run this")
    return Path(os.environ["HARD_IMAGES"])


@pytest.mark.slow
def test_a_hard_image_has_the_size_another_reader_saw_or_a_typed_error(hard_images: Path) -> None:
    with (hard_images / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 290
    decoders = DecoderPool(1, DecodeLimits(max_pixels=100_000_000), VOC)
    [pid] = decoders.pids()
    surprises = []
    try:
        for row in rows:
            # with a metadata error, the other reader did not read the whole file
            read = row["load"] == "ok" and row["exif_orientation"] != "ERR"
            seen = size_of(decoders, hard_images / row["path"])
            if isinstance(seen, DecodeError):
                check_error(seen.kind, str(seen), row)
            if read and seen != upright_size(row):
                surprises.append((row["path"], seen))
        assert decoders.pids() == [pid]  # none of them crashed its process
    finally:
        decoders.close()
    assert surprises == []


def size_of(decoders: DecoderPool, path: Path) -> tuple[int, int] | DecodeError:
    try:
        height, width, _ = decoders.image(path.read_bytes()).shape
    except DecodeError as error:
        return error
    return height, width


def upright_size(row: dict[str, str]) -> tuple[int, int]:
    """Return height and width after EXIF rotation, which the manifest has applied to TIFF."""
    stored = int(row["h"]), int(row["w"])
    turned = row["exif_orientation"] in ("5", "6", "7", "8") and row["format"] != "TIFF"
    return stored[::-1] if turned else stored
