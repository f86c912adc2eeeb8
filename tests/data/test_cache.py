"""The node cache returns the bytes that were listed, and downloads each object once."""

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
from tests.data.tiny_datasets import put_all


@pytest.fixture
def downloads(monkeypatch):
    """Number of storage reads by URI."""
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


def test_an_object_is_downloaded_once_also_for_other_processes(s3_prefix, tmp_path, downloads):
    objects = put(s3_prefix)
    first = NodeCache(tmp_path / "cache", objects, max_bytes=10**6)
    for read in (first, first, pickle.loads(pickle.dumps(first))):
        assert [read(item.uri) for item in objects] == [bytes([i]) * 1000 for i in range(4)]
    assert downloads == {item.uri: 1 for item in objects}
    assert first.fits
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_a_replaced_object_is_downloaded_again_after_a_new_listing(s3_prefix, tmp_path):
    objects = put(s3_prefix, 1)
    before = NodeCache(tmp_path, objects, max_bytes=10**6)
    assert before(objects[0].uri) == bytes(1000)
    storage.write(objects[0].uri, b"new")
    after = NodeCache(tmp_path, storage.list_objects(s3_prefix), max_bytes=10**6)
    assert after(objects[0].uri) == b"new"
    assert before(objects[0].uri) == bytes(1000)  # the version of its own listing


def test_an_object_replaced_after_the_listing_is_refused(s3_prefix, tmp_path):
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


def test_a_file_of_zeros_of_the_right_length_is_not_trusted(s3_prefix, tmp_path, downloads):
    put_all(s3_prefix, {"a": b"x" * 50})
    [item] = storage.list_objects(s3_prefix)
    read = NodeCache(tmp_path, [item], max_bytes=10**6)
    read(item.uri)
    [file] = files(tmp_path)
    file.write_bytes(bytes(66))  # as some file systems leave after a crash
    assert read(item.uri) == b"x" * 50


def test_objects_that_do_not_fit_are_downloaded_every_time(s3_prefix, tmp_path, downloads):
    objects = put(s3_prefix)
    read = NodeCache(tmp_path, objects, max_bytes=2500)
    for _ in range(3):
        assert [read(item.uri) for item in objects] == [bytes([i]) * 1000 for i in range(4)]
    assert [downloads[item.uri] for item in objects] == [1, 1, 3, 3]
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 2500
    assert not read.fits


def test_files_of_other_data_sets_count_against_the_limit(s3_prefix, tmp_path):
    objects = put(s3_prefix)
    for few in (objects[:2], objects[2:]):
        read = NodeCache(tmp_path, few, max_bytes=3500)
        for item in few:
            read(item.uri)
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 3500
    assert len(files(tmp_path)) == 3


def test_local_files_and_unlisted_objects_bypass_the_cache(tmp_path, s3_prefix, downloads):
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


def test_a_full_or_unwritable_disk_only_disables_the_cache(
    s3_prefix, tmp_path, monkeypatch, downloads, caplog
):
    [item] = put(s3_prefix, 1)
    (tmp_path / "file").write_text("a file where the cache folder should be")
    refused = NodeCache(tmp_path / "file" / "cache", [item], max_bytes=10**6)
    monkeypatch.setattr(cache, "MIN_FREE_FRACTION", 1.0)
    full = NodeCache(tmp_path / "cache", [item], max_bytes=10**6)
    for read in (refused, full):
        assert read(item.uri) == bytes(1000)
        assert read(item.uri) == bytes(1000)
    assert downloads[item.uri] == 4
    assert files(tmp_path / "cache") == []
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # once per cache


def test_several_processes_fill_one_folder_concurrently(s3_prefix, tmp_path):
    objects = put(s3_prefix, 20)
    read = NodeCache(tmp_path, objects, max_bytes=10**6)
    uris = [item.uri for item in objects]
    expected = [bytes([i]) * 1000 for i in range(20)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_all, read, uris) for _ in range(2)]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(read, uris)) == expected
        assert [job.result() for job in jobs] == [expected, expected]
    assert len(files(tmp_path)) == 20  # no temporary files


def _all(read, uris):
    return [read(uri) for uri in uris]


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_bytes -1: must be at least 0; 0 caches nothing"):
        NodeCache(tmp_path, [], max_bytes=-1)
