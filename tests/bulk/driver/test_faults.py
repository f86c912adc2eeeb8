"""Systemic faults stop a segmenter; faults of single images do not."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker import storage_probe
from pipeline.bulk.worker.failure_streaks import FAILURES_IN_A_ROW, CutOffError, SystemicError
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.data import storage
from pipeline.data.storage import StorageError

pytestmark = pytest.mark.process

SettingsFor = Callable[..., BulkSettings]
ListedBy = Callable[..., list[ImageRef]]
WorkFor = Callable[..., WorkerContext]
SmallImage = Callable[[int], tuple[str, bytes, bytes]]


@pytest.fixture
def many(
    tmp_path: Path, small_image: SmallImage, settings_for: SettingsFor, listed: ListedBy
) -> tuple[BulkSettings, list[ImageRef]]:
    """More images than a failure streak needs, all of one size."""
    settings = settings_for(str(tmp_path), labels=None)
    data = small_image(11)[1]
    for i in range(60):
        storage.write(f"{settings.images}/{i:03d}.jpg", data)
    return settings, listed(settings)


def _refuse(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[[str], bool], kind: Any = "access"
) -> None:
    read = storage.read

    def refusing(uri: str, etag: str | None = None) -> bytes:
        if uri.endswith(".jpg") and refused(uri):
            raise StorageError(kind, f"{uri}: access denied")
        return read(uri, etag)

    monkeypatch.setattr(storage, "read", refusing)


def _shards(work: WorkerContext) -> list[str]:
    return [item.uri for item in storage.list_objects(work.layout.images)]


def test_storage_that_refuses_everything_aborts_at_the_first_shard(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, images = many
    work = work_for(settings)
    with closing(Segmenter(work)) as segmenter:
        segmenter.segment(0, images[:5])
        _refuse(monkeypatch, lambda _: True)
        with pytest.raises(SystemicError, match=r"no longer delivers images: .*004\.jpg: .*denied"):
            segmenter.segment(1, images[5:10])
    assert len(_shards(work)) == 1
    with closing(Segmenter(work)) as restarted, pytest.raises(SystemicError, match="denied"):
        restarted.segment(1, images[5:10])
    assert len(_shards(work)) == 1


def test_an_image_refused_once_is_fetched_again_at_the_end_of_the_shard(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, images = many
    reads: list[str] = []

    def once(uri: str) -> bool:
        reads.append(uri)
        return uri.endswith("3.jpg") and reads.count(uri) == 1

    with closing(Segmenter(work_for(settings))) as segmenter:
        expected, _ = segmenter.rows_of(0, images[:20])
        _refuse(monkeypatch, once, kind="timeout")
        data, summary = segmenter.rows_of(0, images[:20])
    assert not summary.errors
    assert reads.count(images[3].uri) == reads.count(images[13].uri) == 2
    assert pq.read_table(io.BytesIO(data)).equals(pq.read_table(io.BytesIO(expected)))


def test_fifty_consecutive_failures_of_one_kind_abort_the_run(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, images = many
    work = work_for(settings)
    with closing(Segmenter(work)) as segmenter:
        _refuse(monkeypatch, lambda uri: not uri.endswith("005.jpg"))
        before = [segmenter.segment(i, images[20 * i : 20 * i + 20]) for i in range(2)]
        with pytest.raises(SystemicError, match=r"50 images in a row failed \(access\): .*denied"):
            segmenter.segment(2, images[40:])
    assert [summary.errors["access"] for summary in before] == [19, 20]
    assert len(_shards(work)) == 2


def test_failures_that_are_not_consecutive_abort_nothing(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, images = many
    with closing(Segmenter(work_for(settings))) as segmenter:
        _refuse(monkeypatch, lambda uri: not uri.endswith("030.jpg"))
        summary = segmenter.segment(0, images)
    assert summary.errors == {"access": 59}


def test_any_number_of_consecutive_broken_images_aborts_nothing(
    tmp_path: Path,
    settings_for: SettingsFor,
    work_for: WorkFor,
    small_image: SmallImage,
    listed: ListedBy,
) -> None:
    settings = settings_for(str(tmp_path), labels=None)
    data = small_image(1)[1]
    for i in range(60):
        storage.write(f"{settings.images}/{i:03d}.jpg", data[: len(data) // 2])
    with closing(Segmenter(work_for(settings))) as segmenter:
        assert segmenter.segment(0, listed(settings)).errors == {"truncated": 60}


def test_a_network_that_never_fits_into_memory_aborts_the_run(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any, **__: Any) -> Any:
        raise MemoryError

    settings, images = many
    work = work_for(settings)
    assert len(images) > FAILURES_IN_A_ROW
    with closing(Segmenter(work)) as segmenter:
        monkeypatch.setattr("pipeline.model.predict.segment", too_large)
        with pytest.raises(SystemicError, match="out_of_memory"):
            segmenter.segment(0, images)
    assert _shards(work) == []


def test_a_batch_out_of_memory_is_retried_one_image_at_a_time(
    tmp_path: Path,
    settings_for: SettingsFor,
    work_for: WorkFor,
    small_image: SmallImage,
    listed: ListedBy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.model import predict

    segment, calls = predict.segment, []

    def picky(model: Any, images: Any, **how: Any) -> Any:
        calls.append(len(images))
        if len(images) > 1 or calls.count(1) == 2:
            raise MemoryError
        return segment(model, images, **how)

    settings = settings_for(str(tmp_path), labels=None)
    for number in (11, 23, 35, 47):  # one size
        storage.write(f"{settings.images}/{number}.jpg", small_image(number)[1])
    monkeypatch.setattr(predict, "segment", picky)
    with closing(Segmenter(work_for(settings, batch_images=4))) as segmenter:
        data, summary = segmenter.rows_of(0, listed(settings))
    kinds = pq.read_table(io.BytesIO(data))["error_kind"].to_pylist()
    assert kinds == [None, "out_of_memory", None, None]
    assert (calls, summary.errors) == ([4, 1, 1, 1, 1], {"out_of_memory": 1})


def test_other_errors_of_the_network_are_raised_and_nothing_committed(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    settings, images = many
    work = work_for(settings)
    monkeypatch.setattr("pipeline.model.predict.segment", broken)
    with closing(Segmenter(work)) as segmenter, pytest.raises(RuntimeError, match="illegal"):
        segmenter.segment(0, images[:3])
    assert _shards(work) == []


def test_a_checkpoint_replaced_after_planning_is_refused(
    tmp_path: Path, settings_for: SettingsFor, work_for: WorkFor, checkpoint: str
) -> None:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(Path(checkpoint).read_bytes())
    work = work_for(settings_for(str(tmp_path), checkpoint=str(copy)))
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1  # of a weight's last bits
    copy.write_bytes(bytes(data))
    with pytest.raises(SystemicError, match=r"model\.safetensors was replaced"):
        Segmenter(work)


def test_images_changed_or_deleted_after_planning_are_rows_of_that_kind(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, small_image: SmallImage
) -> None:
    settings, images = many
    storage.write(images[0].uri, small_image(1)[1])
    storage.delete([images[1].uri])
    with closing(Segmenter(work_for(settings))) as segmenter:
        data, _ = segmenter.rows_of(0, images[:3])
    table = pq.read_table(io.BytesIO(data))
    assert table["error_kind"].to_pylist() == ["changed", "vanished", None]


@pytest.mark.parametrize("shard_images", [60, 10])
def test_images_that_disappear_with_their_prefix_abort_the_run(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, shard_images: int
) -> None:
    settings, images = many
    work = work_for(settings)
    storage.delete([image.uri for image in images])
    for ours in ("images/run=other/shard-000000.parquet", "leases/only-new-0123.json"):
        storage.write(f"{settings.images}/results/{ours}", b"ours")
    work = replace(work, layout=replace(work.layout, results=f"{settings.images}/results"))
    count = FAILURES_IN_A_ROW if shard_images > 50 else 10
    nothing = rf"{count} images .*no longer holds any other objects"
    with closing(Segmenter(work)) as segmenter, pytest.raises(CutOffError, match=nothing):
        segmenter.segment(0, images[:shard_images])
    assert _shards(work) == []
    gone = storage_probe.check_access_here(
        work.layout, settings.images
    )  # the check that the driver makes
    assert gone is not None
    assert gone.kind == "vanished"


def test_images_that_are_listed_but_unreadable_abort_the_run(
    many: tuple[BulkSettings, list[ImageRef]], work_for: WorkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, images = many
    _refuse(monkeypatch, lambda _: True, kind="vanished")
    stops = pytest.raises(CutOffError, match=r"50 images in a row vanished: .* is listed")
    with closing(Segmenter(work_for(settings))) as segmenter, stops:
        segmenter.segment(0, images)


def test_an_image_missing_from_a_listing_of_others_was_deleted(prefix: str) -> None:
    names = [f"{prefix}/images/{name}.jpg" for name in ("a/1", "b/c/2", "b/d", "e/3")]
    for name in names[1:3]:
        storage.write(name, b"an image")
    probe = storage_probe.StorageProbe(f"{prefix}/images", f"{prefix}/results")
    assert probe.check_exists({names[0], names[3]}) is None
    for gone in (names[:2], names[2:], names):
        assert f"{gone[0] if gone[0] != names[0] else names[1]} is listed" in str(
            probe.check_exists(gone)
        )
    storage.delete(names[1:3])
    assert "no longer holds any other objects" in str(probe.check_exists(names[:1]))


def test_consecutive_deleted_images_are_rows_if_others_are_listed(
    prefix: str,
    settings_for: SettingsFor,
    work_for: WorkFor,
    small_image: SmallImage,
    listed: ListedBy,
) -> None:
    settings = settings_for(prefix, labels=None)
    for i in range(130):
        storage.write(f"{settings.images}/{i // 120}/{i:03d}.jpg", small_image(11)[1])
    images = listed(settings)
    storage.delete([image.uri for image in images[:120]])
    with closing(Segmenter(work_for(settings))) as segmenter:
        assert segmenter.segment(0, images[:60]).errors == {"vanished": 60}
        assert segmenter.segment(1, images[60:]).errors == {"vanished": 60}


def test_a_closed_segmenter_leaves_no_process(
    tmp_path: Path, settings_for: SettingsFor, work_for: WorkFor
) -> None:
    segmenter = Segmenter(work_for(settings_for(str(tmp_path))))
    pids = segmenter.decoders.pids()
    segmenter.close()
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
