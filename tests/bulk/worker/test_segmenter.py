"""A shard's file has exactly the rows of segmenting each image alone."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.settings import BulkSettings, Inference
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.model import optimize, predict, weights
from pipeline.results import tables

pytestmark = pytest.mark.process

SettingsFor = Callable[..., BulkSettings]
ListedBy = Callable[..., list[ImageRef]]
WorkFor = Callable[..., WorkerContext]
Fill = Callable[[str, int], None]
Rows = list[dict[str, Any]]


@contextmanager
def _segmenter(work: WorkerContext) -> Iterator[Segmenter]:
    with closing(Segmenter(work)) as segmenter:
        yield segmenter


def _rows(work: WorkerContext, images: list[ImageRef]) -> Rows:
    with _segmenter(work) as segmenter:
        data, _ = segmenter.rows_of(3, images)
    rows: Rows = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows


def _mask(row: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(row["mask"])) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.array(image)


def _pixels(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(storage.read(uri))) as image:
        return np.array(image)


def _counted(mask: np.ndarray, confidence: np.ndarray, label: np.ndarray | None) -> Rows:
    """Return the nested class rows of an image, counted pixel by pixel."""
    pairs: Counter[tuple[int, int]] = Counter()
    pixels: Counter[int] = Counter()
    summed: Counter[int] = Counter()
    truth = np.full(mask.shape, 255) if label is None else label
    for found, true, share in zip(
        mask.ravel().tolist(), truth.ravel().tolist(), confidence.ravel().tolist(), strict=True
    ):
        pixels[found] += 1
        summed[found] += share
        if true != 255:
            pairs[true, found] += 1
    rows = []
    for c in sorted(set(pixels) | {true for true, _ in pairs}):
        tp = pairs[c, c]
        fp = sum(count for (true, found), count in pairs.items() if found == c != true)
        fn = sum(count for (true, found), count in pairs.items() if true == c != found)
        union = tp + fp + fn
        scores = {"tp": tp, "fp": fp, "fn": fn, "iou": tp / union if union else None}
        rows.append(
            {
                "class_id": c,
                "class_name": VOC.names[c],
                "pixels": pixels[c],
                "fraction": pixels[c] / mask.size,
                "confidence": summed[c] / pixels[c] if pixels[c] else None,
                **(scores if label is not None else dict.fromkeys(scores)),
            }
        )
    return rows


def _close(found: Rows, expected: Rows) -> None:
    """Return whether the values are equal up to float32 rounding."""
    assert [list(row) for row in found] == [list(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            assert row[name] == (pytest.approx(value, rel=1e-5) if type(value) is float else value)


def test_rows_equal_those_of_segmenting_each_image_alone(
    prefix: str, fill: Fill, settings_for: SettingsFor, work_for: WorkFor, listed: ListedBy
) -> None:
    fill(prefix, 8)
    settings = settings_for(prefix)
    images = listed(settings)
    images[3] = images[3]._replace(label_uri=None, label_etag=None)
    work = work_for(settings)
    rows = _rows(work, images)
    model = optimize.optimize_for_inference(weights.load(settings.checkpoint)[0])
    seen = set()
    for image, row in zip(images, rows, strict=True):
        masks, confidences = predict.segment(model, _pixels(image.uri)[None])
        mask, confidence = masks[0].numpy(), confidences[0].numpy()
        label = None if image.label_uri is None else _pixels(image.label_uri)
        np.testing.assert_array_equal(_mask(row), mask)
        assert (row["height"], row["width"]) == mask.shape
        assert row["confidence"] == pytest.approx(confidence.mean(), rel=1e-5)
        _close(row["classes"], _counted(mask, confidence, label))
        for name in ("uri", "etag", "bytes", "label_uri", "label_etag"):
            assert row[name] == getattr(image, name)
        assert (row["shard"], row["run_id"], row["status"]) == (3, "test", "ok")
        assert (row["model"], row["settings"]) == (work.model, work.settings)
        assert row["error"] is row["error_kind"] is row["label_error"] is None
        seen |= {each["class_name"] for each in row["classes"] if (each["tp"] or 0) > 500}
    assert {"background", "cat", "person", "motorbike"} <= seen


def test_a_broken_image_is_a_row_with_a_kind_and_a_one_line_reason(
    prefix: str,
    fill: Fill,
    fill_broken: Callable[[str], None],
    broken_kinds: dict[str, str],
    bad_labels: dict[str, str],
    settings_for: SettingsFor,
    work_for: WorkFor,
    listed: ListedBy,
) -> None:
    fill(prefix, 3)
    fill_broken(prefix)
    settings = settings_for(prefix, inference=Inference(max_object_bytes=20_000))
    with _segmenter(work_for(settings)) as segmenter:
        images = listed(settings)
        data, summary = segmenter.rows_of(0, images)
    rows = {
        storage.relative(settings.images, row["uri"]): row
        for row in pq.read_table(io.BytesIO(data)).to_pylist()
    }
    too_large = {"0/0000-chelsea.png": "too_large"}  # 26 KB
    errors = {name: row["error_kind"] for name, row in rows.items() if row["status"] == "error"}
    assert errors == broken_kinds | too_large
    for row in (rows[name] for name in errors):
        assert row["error"].isprintable()
        assert 0 < len(row["error"]) <= 500
        assert row["mask"] is row["classes"] is row["confidence"] is row["height"] is None
    for name, message in bad_labels.items():
        assert message in rows[name]["label_error"]
        assert rows[name]["status"] == "ok"
        assert {each["tp"] for each in rows[name]["classes"]} == {None}
    assert summary == ShardSummary(
        shard=0,
        images=len(images),
        errors=Counter(errors.values()),
        label_errors=2,
        bytes_read=summary.bytes_read,
        wait_s=summary.wait_s,
        infer_s=summary.infer_s,
    )


def test_a_shard_file_has_schema_and_footer_and_is_never_replaced(
    prefix: str, fill: Fill, settings_for: SettingsFor, work_for: WorkFor, listed: ListedBy
) -> None:
    fill(prefix, 2)
    settings = settings_for(prefix)
    work, images = work_for(settings), listed(settings)
    with _segmenter(work) as segmenter:
        assert segmenter.segment(5, images).committed
        data = storage.read(work.layout.shard(5))
        assert data == segmenter.rows_of(5, images)[0]
        schema = pq.read_schema(pa.BufferReader(data))
        assert schema.equals(tables.IMAGES, check_metadata=False)
        assert tables.classes_from_footer(schema.metadata) == VOC
        assert schema.metadata[b"schema_version"] == b"1"
        storage.write(work.layout.shard(6), b"another driver's")
        assert not segmenter.segment(6, images).committed
        assert storage.read(work.layout.shard(6)) == b"another driver's"


def test_two_shards_at_once_equal_two_in_sequence(
    tmp_path: Path, fill: Fill, settings_for: SettingsFor, work_for: WorkFor, listed: ListedBy
) -> None:
    fill(str(tmp_path), 16)
    settings = settings_for(str(tmp_path))
    images = listed(settings)
    shards = [images[i : i + 4] for i in range(0, 16, 4)]
    with _segmenter(work_for(settings)) as segmenter, ThreadPoolExecutor(2) as pool:
        in_turn = [segmenter.rows_of(i, shard)[0] for i, shard in enumerate(shards)]
        at_once = list(pool.map(lambda i: segmenter.rows_of(i, shards[i])[0], range(4)))
    assert at_once == in_turn


def test_masks_do_not_depend_on_the_batch(
    tmp_path: Path,
    fill: Fill,
    settings_for: SettingsFor,
    work_for: WorkFor,
    listed: ListedBy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # in fp32 on every CPU: with bf16, the order of sums would change masks
    monkeypatch.setattr(optimize, "has_bf16", lambda _: False)
    fill(str(tmp_path), 16)
    settings = settings_for(str(tmp_path))
    images = listed(settings)
    alone = {row["uri"]: row for row in _rows(work_for(settings), images)}
    for order in (images, images[::-1][:9]):
        for row in _rows(work_for(settings, batch_images=4), order):
            same = _mask(row) == _mask(alone[row["uri"]])
            assert same.mean() >= 0.999
            assert abs(row["confidence"] - alone[row["uri"]]["confidence"]) < 1e-3
    assert list(alone.values())[9:] == _rows(work_for(settings), images[9:])
    assert _rows(work_for(settings), []) == []
