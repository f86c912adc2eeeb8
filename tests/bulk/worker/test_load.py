"""A shard's images are loaded in order, as they were listed, within a memory budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest

from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker.decode import DecodeError, Pixels
from pipeline.bulk.worker.load import AHEAD_BYTES, Loader
from pipeline.data import storage

ListedBy = Callable[..., list[ImageRef]]
SettingsFor = Callable[..., BulkSettings]


class FakeDecoders:
    """Decodes "<n>" to an image of n bytes, and records the sizes decoded."""

    def __init__(self) -> None:
        self.decoded: list[int] = []
        self._lock = threading.Lock()

    def image(self, data: bytes) -> Pixels:
        if not data.isdigit():
            raise DecodeError("not_an_image", "it is not a number")
        with self._lock:
            self.decoded.append(int(data))
        time.sleep(0.001 * (int(data) % 7))  # so that they finish in another order
        return np.zeros((1, int(data) // 3, 3), np.uint8)  # costs no memory until it is touched

    def label(self, data: bytes, size: tuple[int, int]) -> Pixels:
        if data == b"bad":
            raise DecodeError("label", "label is bad")
        return np.zeros(size, np.uint8)

    def wait_until_idle(self) -> None:
        before = -1
        while before != len(self.decoded):
            before = len(self.decoded)
            time.sleep(0.25)


@contextmanager
def _loader(
    decoders: FakeDecoders, *, count: int = 2, max_object_bytes: int = 100
) -> Iterator[Loader]:
    with closing(Loader(decoders, count, max_object_bytes=max_object_bytes)) as loader:  # type: ignore[arg-type]
        yield loader


def _images(prefix: str, sizes: list[int], labels: list[bytes] | None = None) -> list[ImageRef]:
    for i, size in enumerate(sizes):
        storage.write(f"{prefix}/{i:03d}", b"%d" % size)
    for i, label in enumerate(labels or []):
        storage.write(f"{prefix}-labels/{i:03d}", label)
    truth = list(storage.list_objects(f"{prefix}-labels")) if labels else []
    return [
        ImageRef(*image, *(truth[i][:2] if i < len(truth) else (None, None)))
        for i, image in enumerate(sorted(storage.list_objects(prefix)))
    ]


def test_images_arrive_in_the_order_of_the_plan(prefix: str) -> None:
    sizes = [3 * (1 + 37 * i % 50) for i in range(60)]
    images = _images(prefix, sizes)
    with _loader(FakeDecoders(), count=3) as loader:
        found = list(loader.stream(images))
        again = list(loader.stream(images[::-1]))
    assert [loaded.listed for loaded in found] == images
    assert [loaded.image.nbytes for loaded in found if loaded.image is not None] == sizes
    assert [loaded.listed for loaded in again] == images[::-1]


def test_replaced_is_changed_deleted_is_vanished_and_the_rest_load(
    prefix: str,
) -> None:
    images = _images(prefix, [3, 6, 9, 12])
    storage.write(images[1].uri, b"66666")
    storage.delete([images[2].uri])
    with _loader(FakeDecoders()) as loader:
        found = list(loader.stream(images))
    assert [loaded.error_kind for loaded in found] == [None, "changed", "vanished", None]
    assert [loaded.image is None for loaded in found] == [False, True, True, False]
    assert all(loaded.listed.uri in str(loaded.error) for loaded in found[1:3])


def test_a_bad_replaced_or_deleted_label_costs_only_the_label(prefix: str) -> None:
    images = _images(prefix, [3, 6, 9, 12], [b"good", b"bad", b"old", b"old"])
    storage.write(str(images[2].label_uri), b"newer")
    storage.delete([str(images[3].label_uri)])
    with _loader(FakeDecoders()) as loader:
        found = list(loader.stream(images))
    assert [loaded.error_kind for loaded in found] == [None] * 4
    assert [loaded.label is not None for loaded in found] == [True, False, False, False]
    assert found[0].label_error is None
    for loaded, part in zip(found[1:], ("is bad", "was replaced", "not exist"), strict=True):
        assert part in str(loaded.label_error)


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reads: list[str] = []
    read = storage.read

    def counted(uri: str, etag: str | None = None) -> bytes:
        reads.append(uri)
        return read(uri, etag)

    monkeypatch.setattr(storage, "read", counted)
    return reads


def test_an_object_over_the_limit_is_an_error_and_is_not_fetched(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _images(prefix, [3, 6, 9])
    storage.write(images[1].uri, b"6" * 101)
    images = [ImageRef(*item, None, None) for item in sorted(storage.list_objects(prefix))]
    reads = _count_reads(monkeypatch)
    with _loader(FakeDecoders(), max_object_bytes=100) as loader:
        found = list(loader.stream(images))
    assert [loaded.error_kind for loaded in found] == [None, "too_large", None]
    assert "101 bytes are over the limit of 100" in str(found[1].error)
    assert sorted(reads) == [images[0].uri, images[2].uri]


def test_a_label_over_the_limit_is_a_label_error_and_is_not_fetched(
    tmp_path: object, settings_for: SettingsFor, listed: ListedBy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(f"{tmp_path}/images/1.jpg", b"3")
    storage.write(f"{tmp_path}/labels/1.png", b"L" * 101)
    images = listed(settings_for(str(tmp_path)))
    reads = _count_reads(monkeypatch)
    with _loader(FakeDecoders(), max_object_bytes=100) as loader:
        [found] = loader.stream(images)
    assert (found.error_kind, found.label) == (None, None)
    assert "101" in str(found.label_error)
    assert not found.label_refused
    assert reads == [images[0].uri]


@pytest.mark.parametrize(
    "sizes",
    [[30_000_000] * 64, [3_000] * 32 + [30_000_000] * 64],
    ids=["large images", "small ones first"],
)
def test_waiting_decoded_pixels_are_bounded_whatever_the_sizes(
    tmp_path: object, sizes: list[int]
) -> None:
    decoders, count = FakeDecoders(), 2
    # each thread (two per decoder) may hold one image started before its size was known
    allowed = AHEAD_BYTES + 2 * count * max(sizes)
    with _loader(decoders, count=count) as loader:
        stream = loader.stream(_images(f"{tmp_path}/p", sizes))
        consumed = 0
        for loaded in stream:
            assert loaded.image is not None
            consumed += loaded.image.nbytes
            if loaded.listed.uri.endswith(("000", "031", "032", "040", "060")):
                decoders.wait_until_idle()  # like a network slower than the decoders
            assert sum(decoders.decoded) - consumed <= allowed
    assert sorted(decoders.decoded) == sorted(sizes)


def test_bytes_of_a_broken_image_count_as_read(tmp_path: object) -> None:
    images = _images(f"{tmp_path}/p", [3])
    storage.write(images[0].uri, b"broken")
    images = [ImageRef(*item, None, None) for item in storage.list_objects(f"{tmp_path}/p")]
    with _loader(FakeDecoders()) as loader:
        [found] = loader.stream(images)
    assert (found.error_kind, found.fetched_bytes) == ("not_an_image", 6)
