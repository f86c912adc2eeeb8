"""Oversized objects: decompression bombs, an empty file, and 5 GB that must not be read."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from pipeline.bulk.planning.listing import ImageRef, Listing
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker.decode import DecodeLimits, DecoderPool
from pipeline.bulk.worker.load import Loader
from pipeline.data.labels import VOC
from tests.small_images import encode

HUGE_BYTES = 5 * 2**30


def bomb(side: int) -> bytes:
    """Return a complete PNG of side x side pixels of one bit each, in 20 to 200 KB."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checked = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checked

    packer = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@pytest.mark.slow
def test_bombs_empty_and_huge_files_are_error_rows_in_little_memory(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, side in (("13000.png", 13_000), ("40000.png", 40_000)):
        (images / name).write_bytes(bomb(side))
    assert 20_000 <= (images / "13000.png").stat().st_size < 30_000
    (images / "empty.jpg").touch()
    with (images / "huge.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        os.truncate(file.fileno(), HUGE_BYTES)
    (images / "good.png").write_bytes(encode(Image.new("RGB", (31, 17)), "PNG"))
    settings = BulkSettings(
        images=str(images), results=str(tmp_path / "results"), checkpoint="/none"
    )
    decoders = DecoderPool(1, DecodeLimits(max_pixels=settings.inference.max_pixels), VOC)
    pids = decoders.pids()
    loader = Loader(decoders, 1, max_object_bytes=settings.inference.max_object_bytes)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = peak_kib()
    try:
        with Listing(settings, model="m", settings_print="s") as listing:
            planned: list[ImageRef] = list(listing.images())
        found = {Path(each.listed.uri).name: each for each in loader.stream(planned)}
        children = [Path(f"/proc/{pid}/status").read_text() for pid in decoders.pids()]
        assert decoders.pids() == pids
    finally:
        loader.close()
        decoders.close()
    kinds = {name: each.error_kind for name, each in found.items()}
    assert kinds == {
        "13000.png": "too_large",
        "40000.png": "too_large",
        "empty.jpg": "empty",
        "huge.jpg": "too_large",
        "good.png": None,
    }
    assert found["huge.jpg"].fetched_bytes == 0
    assert str(HUGE_BYTES) in str(found["huge.jpg"].error)  # the size in the listing
    assert "13000" in str(found["13000.png"].error) or "169000000" in str(found["13000.png"].error)
    assert peak_kib() - before < 300_000
    [peak] = [int(line.split()[1]) for text in children for line in text.splitlines()
              if line.startswith("VmHWM:")]  # fmt: skip
    assert peak < 400_000  # KiB; decoded, the bombs would take 495,000 and 4.7 million
    image = Image.open(io.BytesIO(bomb(64)))  # bombs are complete images, only large
    assert image.convert("L").getextrema() == (0, 0)
