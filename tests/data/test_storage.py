"""Storage behaves the same on local disk and on a real S3 server."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data import storage
from pipeline.data.storage import local


def test_a_written_object_is_listed_and_read_back_by_its_etag(prefix: str) -> None:
    storage.write(f"{prefix}/a/b.bin", b"12345")
    [listed] = storage.list_objects(prefix)
    assert (listed.uri, listed.size) == (f"{prefix}/a/b.bin", 5)
    assert storage.read(listed.uri, listed.etag) == b"12345"
    assert storage.stat_object(listed.uri) == listed


def test_reading_a_replaced_or_deleted_object_is_an_error_of_its_kind(prefix: str) -> None:
    uri = f"{prefix}/a"
    storage.write(uri, b"old")
    [listed] = storage.list_objects(prefix)
    storage.write(uri, b"NEW")  # of the same size
    with pytest.raises(storage.StorageError) as changed:
        storage.read(uri, listed.etag)
    storage.delete([uri])
    with pytest.raises(storage.StorageError) as vanished:
        storage.read(uri, listed.etag)
    assert (changed.value.kind, vanished.value.kind) == ("changed", "vanished")
    assert not storage.exists(uri)


def test_exactly_one_of_several_concurrent_creators_wins(prefix: str) -> None:
    start = threading.Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        return storage.create(f"{prefix}/one", b"from %d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert storage.read(f"{prefix}/one") == b"from %d" % won.index(True)


def test_a_listing_comes_in_pages_with_each_object_once(prefix: str) -> None:
    names = [f"{i:04d}" for i in range(1100)] + ["a.b", "a/b", "a0", "é", "a b", "%2e", "z/y/x"]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.write(f"{prefix}/{name}", b"."), names))
    pages = list(storage.list_pages(prefix))
    found = [storage.relative(prefix, item.uri) for page in pages for item in page]
    assert sorted(found) == sorted(names)
    assert max(map(len, pages)) == storage.PAGE_OBJECTS


def test_a_listing_excludes_prefixes_that_start_alike(prefix: str) -> None:
    storage.write(f"{prefix}/run=1/x", b".")
    storage.write(f"{prefix}/run=10/x", b".")
    assert [item.uri for item in storage.list_objects(f"{prefix}/run=1")] == [f"{prefix}/run=1/x"]
    assert list(storage.list_objects(f"{prefix}/nothing")) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_listing_of_a_range_equals_a_filtered_listing(
    prefix: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for backend in ("local", "s3"):
        monkeypatch.setattr(f"pipeline.data.storage.{backend}.PAGE_OBJECTS", 3)
    draw = random.Random(seed)
    names = {"".join(draw.choices("ab-.0é", k=draw.randrange(1, 4))) for _ in range(25)}
    names -= {".", ".."}
    for name in names:
        storage.write(f"{prefix}/{name}", b".")
    bounds = [*sorted(names, key=str.encode), "a", "b0", "é-", "0"]
    for first, last in (draw.choices(bounds, k=2) for _ in range(8)):
        found = storage.list_objects(prefix, between=(f"{prefix}/{first}", f"{prefix}/{last}"))
        wanted = {name for name in names if first.encode() <= name.encode() <= last.encode()}
        assert [storage.relative(prefix, item.uri) for item in found] == sorted(
            wanted, key=str.encode
        )


@pytest.mark.s3
def test_a_listing_of_a_range_requests_no_pages_outside_it(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.storage import s3

    monkeypatch.setattr(s3, "PAGE_OBJECTS", 3)
    for number in range(30):
        storage.write(f"{s3_prefix}/{number:02d}", b".")
    between = (f"{s3_prefix}/10", f"{s3_prefix}/14")
    pages = list(storage.list_pages(s3_prefix, between=between))
    assert len(pages) <= 3  # five objects are on two pages; a third may be needed to see the end
    names = [storage.relative(s3_prefix, item.uri) for page in pages for item in page]
    assert names == ["10", "11", "12", "13", "14"]


@pytest.mark.parametrize(
    "text",
    [
        *("2026-11-01T12:00:00.000Z", "2026-11-01T12:00:00Z", "2026-11-01T12:00:00.123456+02:00"),
        *("Sun, 01 Nov 2026 12:00:00 GMT", "1793534400", 1793534400, 1793534400.5),
    ],
)
def test_dates_are_parsed_as_by_botocore(text: object) -> None:
    from botocore.utils import parse_timestamp

    from pipeline.data.storage import s3

    assert s3._parse_date(text) == parse_timestamp(text)


@pytest.mark.s3
def test_the_dates_of_a_listing_use_the_fast_parser(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.storage import s3

    def slow(text: object) -> None:
        raise AssertionError(f"{text} went through the slow parser")

    storage.write(f"{s3_prefix}/a", b".")
    for module in ("botocore.parsers", "botocore.utils", s3.__name__):
        monkeypatch.setattr(f"{module}.parse_timestamp", slow, raising=False)
    assert len(list(storage.list_objects(s3_prefix))) == 1


def test_create_refuses_an_object_too_large_for_one_put(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.storage.base.MAX_CREATE_BYTES", 10)
    with pytest.raises(ValueError, match=r"11 bytes are too large for one PUT, at most 10"):
        storage.create(f"{prefix}/big", b"x" * 11)
    assert not storage.exists(f"{prefix}/big")


def test_many_threads_read_concurrently(prefix: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write(f"{prefix}/{i}", b"%d" % i * 1000), range(64)))
        read = list(pool.map(lambda i: storage.read(f"{prefix}/{i}"), range(64)))
    assert read == [b"%d" % i * 1000 for i in range(64)]


@pytest.mark.s3
def test_s3_errors_are_one_line(
    s3_environment: dict[str, str], s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.storage import s3

    with pytest.raises(storage.StorageError, match="bucket no-such-bucket does not exist"):
        list(storage.list_objects("s3://no-such-bucket/x"))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        s3.filesystem.cache_clear()
        with pytest.raises(storage.StorageError, match="access denied") as denied:
            storage.read(f"{s3_prefix}/x")
    s3.filesystem.cache_clear()
    assert denied.value.kind == "access"
    assert "\n" not in str(denied.value)
    assert "wrong" not in str(denied.value)


@pytest.mark.s3
def test_a_write_whose_response_was_lost_counts_as_created(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiohttp import ClientConnectionError

    from pipeline.data.storage import s3

    client = s3.filesystem().connect()
    put_object = client.put_object

    async def put_and_lose_the_first_reply(**request: object) -> object:
        answer = await put_object(**request)
        if not lost:
            lost.append(answer)
            raise ClientConnectionError("the response was lost")
        return answer

    lost: list[object] = []
    monkeypatch.setattr(client, "put_object", put_and_lose_the_first_reply)
    assert storage.create(f"{s3_prefix}/a", b"mine")
    assert lost
    assert not storage.create(f"{s3_prefix}/a", b"mine")  # no response lost this time


def test_a_killed_writer_leaves_nothing_that_a_listing_shows(tmp_path: Path) -> None:
    left = tmp_path / f".shard.parquet.{'0' * 16}.tmp"
    left.write_bytes(b"half")
    assert list(storage.list_objects(str(tmp_path))) == []
    assert storage.leftovers(str(tmp_path)) == [str(left)]
    assert not local.is_temporary("image.tmp")


def test_a_path_below_a_file_is_an_error_naming_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(storage.StorageError, match="file/x"):
        storage.create(str(tmp_path / "file" / "x" / "y"), b"")


def test_names_that_are_not_utf8_are_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb"):
        pass
    assert list(storage.list_objects(str(tmp_path))) == []
    assert "\\xff.jpg" in caplog.text


@pytest.mark.parametrize(
    ("uri", "normal"),
    [("s3://b/a/", "s3://b/a"), ("s3://b", "s3://b"), ("s3://b/a//c", "s3://b/a//c")],
)
def test_uris_are_normalized(uri: str, normal: str) -> None:
    assert storage.normalize(uri) == normal


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="neither s3://"):
        storage.normalize("gs://bucket/x")


def test_cycles_of_links_list_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert [item.uri for item in storage.list_objects(str(tmp_path))] == [f"{tmp_path}/a/x.jpg"]


def test_a_failed_write_removes_the_folders_it_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(storage.StorageError, match="No space left"):
        storage.create(f"{tmp_path}/new/folder/x", b"1")
    assert list(tmp_path.iterdir()) == []
