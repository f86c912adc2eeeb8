"""Labels that storage refuses stop a run as images do, or cost only an image's scores."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.settings import BulkSettings, Inference
from pipeline.bulk.worker.failure_streaks import CutOffError, SystemicError
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.data import storage
from pipeline.data.storage import StorageError
from pipeline.model import predict

pytestmark = pytest.mark.process

Labeled = tuple[BulkSettings, list[ImageRef]]
Refuse = Callable[..., Counter[str]]


@pytest.fixture
def labeled(
    tmp_path: Path, small_image: Any, settings_for: Callable[..., BulkSettings], listed: Any
) -> Labeled:
    """More images with labels than a failure streak needs."""
    settings = settings_for(str(tmp_path))
    _, image, label = small_image(11)
    for i in range(60):
        storage.write(f"{settings.images}/{i:03d}.jpg", image)
        storage.write(f"{settings.labels}/{i:03d}.png", label)
    return settings, listed(settings)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """`refuse(which, kind)` makes storage refuse labels; returns how often each object was read.

    `which(uri, reads)` says whether a label is refused that was read `reads` times.
    """
    read, reads = storage.read, Counter[str]()

    def refusing(which: Callable[[str, int], bool], kind: Any = "access") -> Counter[str]:
        def reading(uri: str, etag: str | None = None) -> bytes:
            reads[uri] += 1
            if uri.endswith(".png") and which(uri, reads[uri]):
                raise StorageError(kind, f"{uri}: access denied")
            return read(uri, etag)

        monkeypatch.setattr(storage, "read", reading)
        return reads

    return refusing


@pytest.fixture
def networked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that went through the network, by the batch."""
    segment, seen = predict.segment, []

    def noted(model: Any, images: Any, **how: Any) -> Any:
        seen.append(len(images))
        return segment(model, images, **how)

    monkeypatch.setattr(predict, "segment", noted)
    return seen


def _rows(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows


@pytest.mark.parametrize("given_before", [True, False])
def test_refusing_all_labels_aborts_before_images_are_committed(
    labeled: Labeled, work_for: Callable[..., WorkerContext], refuse: Refuse, given_before: bool
) -> None:
    settings, images = labeled
    work = work_for(settings)
    with closing(Segmenter(work)) as segmenter:
        if given_before:
            segmenter.rows_of(0, images[:3])
        refuse(lambda *_: True)
        with pytest.raises(CutOffError, match=r"no longer delivers labels: .*\.png: access denied"):
            segmenter.segment(1, images[3:10])
        with pytest.raises(SystemicError, match=r"50 labels in a row failed \(access\): .*denied"):
            segmenter.segment(2, images[3:])
    assert not storage.exists(work.layout.shard(1))
    assert not storage.exists(work.layout.shard(2))


def test_a_label_refused_once_is_fetched_again_but_inferred_once(
    labeled: Labeled, work_for: Callable[..., WorkerContext], refuse: Refuse, networked: list[int]
) -> None:
    settings, images = labeled
    with closing(Segmenter(work_for(settings))) as segmenter:
        expected, _ = segmenter.rows_of(0, images[:6])
        networked.clear()
        reads = refuse(lambda uri, times: uri.endswith("3.png") and times == 1, kind="timeout")
        data, summary = segmenter.rows_of(0, images[:6])
    assert _rows(data) == _rows(expected)
    assert summary.label_errors == 0
    assert reads[str(images[3].label_uri)] == 2
    assert sum(networked) == 6


def test_a_label_refused_twice_costs_its_image_only_the_scores(
    labeled: Labeled, work_for: Callable[..., WorkerContext], refuse: Refuse, networked: list[int]
) -> None:
    settings, images = labeled
    refuse(lambda uri, _: not uri.endswith("30.png"))
    with closing(Segmenter(work_for(settings))) as segmenter:
        data, summary = segmenter.rows_of(0, images[:45])
    rows = _rows(data)
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["uri"] for row in rows if row["label_error"] is None] == [images[30].uri]
    assert summary.label_errors == 44
    assert sum(networked) == 45


def test_a_label_over_the_size_limit_is_not_a_refusal(
    labeled: Labeled, work_for: Callable[..., WorkerContext], refuse: Refuse
) -> None:
    settings, images = labeled
    large = [image._replace(label_bytes=10**9) for image in images]
    small = replace(settings, inference=Inference(max_object_bytes=10**8))
    reads = refuse(lambda *_: False)
    with closing(Segmenter(work_for(small))) as segmenter:
        data, summary = segmenter.rows_of(0, large)
    assert summary.label_errors == 60
    assert all("over the limit" in row["label_error"] for row in _rows(data))
    assert {times for uri, times in reads.items() if uri.startswith(settings.images)} == {1}


def test_labels_that_disappear_with_their_prefix_abort_the_run(
    labeled: Labeled, work_for: Callable[..., WorkerContext]
) -> None:
    settings, images = labeled
    storage.delete([str(image.label_uri) for image in images[:55]])
    with closing(Segmenter(work_for(settings))) as segmenter:
        assert segmenter.rows_of(0, images)[1].label_errors == 55
        storage.delete([str(image.label_uri) for image in images[55:]])
        with pytest.raises(
            CutOffError, match=r"50 labels in a row vanished: .* no longer holds any other objects"
        ):
            segmenter.rows_of(0, images)
