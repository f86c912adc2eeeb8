"""The cache of a node: what it serves is what was listed, and it fetches it once."""

import multiprocessing
import pickle
import stat
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data import cache, storage
from pipeline.data.cache import NodeCache
from pipeline.data.storage import StorageError
from tests.data.drawn import put_all


@pytest.fixture
def downloads(monkeypatch):
    """How often each object was read from storage."""
    read, counts = storage.read, Counter()

    def counted(uri, etag=None):
        counts[uri] += 1
        return read(uri, etag)

    monkeypatch.setattr(storage, "read", counted)
    return counts


def put(prefix, count=4, size=1000):
    put_all(prefix, {f"{i:02}.bin": bytes([i]) * size for i in range(count)})
    return sorted(storage.list_objects(prefix))


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def test_an_object_is_downloaded_once_whoever_asks_later(s3_prefix, tmp_path, downloads):
    objects = put(s3_prefix)
    first = NodeCache(tmp_path / "cache", objects, max_bytes=10**6)
    for read in (first, first, pickle.loads(pickle.dumps(first))):
        assert [read(item.uri) for item in objects] == [bytes([i]) * 1000 for i in range(4)]
    assert downloads == {item.uri: 1 for item in objects}
    assert first.fits
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_a_replaced_object_is_never_served_from_its_old_bytes(s3_prefix, tmp_path):
    objects = put(s3_prefix, 1)
    before = NodeCache(tmp_path, objects, max_bytes=10**6)
    assert before(objects[0].uri) == bytes(1000)
    storage.write(objects[0].uri, b"new")
    after = NodeCache(tmp_path, storage.list_objects(s3_prefix), max_bytes=10**6)
    assert after(objects[0].uri) == b"new"
    assert before(objects[0].uri) == bytes(1000)  # what its split was listed with


def test_what_was_replaced_since_it_was_listed_is_refused(s3_prefix, tmp_path):
    objects = put(s3_prefix, 1)
    storage.write(objects[0].uri, b"new")
    for max_bytes in (10**6, 0):
        with pytest.raises(StorageError) as caught:
            NodeCache(tmp_path, objects, max_bytes=max_bytes)(objects[0].uri)
        assert caught.value.kind == "changed"


@pytest.mark.parametrize("keep", [0, 5, 16, 17, 1015])
def test_a_torn_file_is_downloaded_again(s3_prefix, tmp_path, downloads, keep):
    [item] = put(s3_prefix, 1)
    read = NodeCache(tmp_path, [item], max_bytes=10**6)
    read(item.uri)
    [file] = files(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    assert read(item.uri) == bytes(1000)
    assert read(item.uri) == bytes(1000)
    assert downloads[item.uri] == 2


def test_zeros_of_the_right_length_are_not_taken_for_the_object(s3_prefix, tmp_path, downloads):
    put_all(s3_prefix, {"a": b"x" * 50})
    [item] = storage.list_objects(s3_prefix)
    read = NodeCache(tmp_path, [item], max_bytes=10**6)
    read(item.uri)
    [file] = files(tmp_path)
    file.write_bytes(bytes(66))  # what some file systems leave after a crash
    assert read(item.uri) == b"x" * 50


def test_what_has_no_room_is_read_through_every_time(s3_prefix, tmp_path, downloads):
    objects = put(s3_prefix)
    read = NodeCache(tmp_path, objects, max_bytes=2500)
    for _ in range(3):
        assert [read(item.uri) for item in objects] == [bytes([i]) * 1000 for i in range(4)]
    assert [downloads[item.uri] for item in objects] == [1, 1, 3, 3]
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 2500
    assert not read.fits


def test_what_other_sets_left_in_the_folder_counts_against_the_limit(s3_prefix, tmp_path):
    objects = put(s3_prefix)
    for few in (objects[:2], objects[2:]):
        read = NodeCache(tmp_path, few, max_bytes=3500)
        for item in few:
            read(item.uri)
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 3500
    assert len(files(tmp_path)) == 3


def test_local_files_and_objects_that_were_not_listed_are_read_as_they_are(
    tmp_path, s3_prefix, downloads
):
    put_all(str(tmp_path), {"a": b"local"})
    put_all(s3_prefix, {"b": b"remote"})
    read = NodeCache(tmp_path / "cache", storage.list_objects(str(tmp_path)), max_bytes=10**6)
    put_all(str(tmp_path), {"a": b"another node's copy"})
    for _ in range(2):
        assert read(f"{tmp_path}/a") == b"another node's copy"
        assert read(f"{s3_prefix}/b") == b"remote"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(StorageError) as caught:
        read(f"{tmp_path}/none")
    assert caught.value.kind == "vanished"


def test_a_disk_that_is_nearly_full_or_refuses_costs_downloads_alone(
    s3_prefix, tmp_path, monkeypatch, downloads, caplog
):
    [item] = put(s3_prefix, 1)
    (tmp_path / "file").write_text("where a folder should be")
    refused = NodeCache(tmp_path / "file" / "cache", [item], max_bytes=10**6)
    monkeypatch.setattr(cache, "MIN_FREE_SHARE", 1.0)
    full = NodeCache(tmp_path / "cache", [item], max_bytes=10**6)
    for read in (refused, full):
        assert read(item.uri) == bytes(1000)
        assert read(item.uri) == bytes(1000)
    assert downloads[item.uri] == 4
    assert files(tmp_path / "cache") == []
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # one a cache


def test_many_processes_fill_one_folder_at_once(s3_prefix, tmp_path):
    objects = put(s3_prefix, 20)
    read = NodeCache(tmp_path, objects, max_bytes=10**6)
    uris = [item.uri for item in objects]
    expected = [bytes([i]) * 1000 for i in range(20)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_all, read, uris) for _ in range(2)]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(read, uris)) == expected
        assert [job.result() for job in jobs] == [expected, expected]
    assert len(files(tmp_path)) == 20  # no temporary ones


def _all(read, uris):
    return [read(uri) for uri in uris]


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_bytes is -1; it must be at least 0"):
        NodeCache(tmp_path, [], max_bytes=-1)
