"""The record of a run equals plain counting over its shards in Python."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.bulk.driver.finalize import Outcome, RunFinalizer
from pipeline.cli.exit import run_job
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.results import files, tables
from pipeline.results.layout import RunLayout
from pipeline.runs import lease
from tests.bulk.made_runs import (
    FinalizerFor,
    class_parts,
    make_finalizer,
    rows_of,
    sorted_classes,
    table_of,
    tuples_of,
)

FACTS = {
    "checkpoint": "/c.safetensors",
    "checkpoint_sha256": "0" * 64,
    "code_version": "1",
    "bytes_read": 7,
    "seconds": 2.0,
    "images_per_second": None,
}


def _record(finalizer: RunFinalizer, layout: RunLayout) -> dict[str, Any]:
    finalizer.write_record(finalizer.outcome(), FACTS)
    table = table_of(storage.read(layout.record))
    assert table.schema.equals(tables.RUNS, check_metadata=False)
    [row] = table.to_pylist()
    assert isinstance(row, dict)
    return row


def test_the_counts_in_the_record_equal_plain_counting(
    finalizer_for: FinalizerFor, prefix: str
) -> None:
    rows = rows_of(90)
    finalizer, layout = finalizer_for(prefix, rows)
    record = _record(finalizer, layout)
    kinds = Counter(row["error_kind"] for row in rows if row["status"] == "error")
    by_count = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    label_errors = sum("label_error" in row for row in rows)
    assert finalizer.outcome() == Outcome(
        images=90,
        ok=90 - kinds.total(),
        errors=kinds.total(),
        label_errors=label_errors,
        errors_by_kind=tuple(by_count),
    )
    assert [tuple(each.values()) for each in record["errors_by_kind"]] == by_count
    counts: dict[int, list[int]] = {}
    for each in (each for row in rows for each in row.get("classes") or [] if "tp" in each):
        total = counts.setdefault(each["class_id"], [0, 0, 0])
        counts[each["class_id"]] = [
            a + each[b] for a, b in zip(total, ("tp", "fp", "fn"), strict=True)
        ]
    ious = {c: total[0] / sum(total) if sum(total) else None for c, total in counts.items()}
    assert record["class_iou"] == [
        {"class_id": c, "class_name": VOC.names[c], "tp": tp, "fp": fp, "fn": fn, "iou": ious[c]}
        for c, (tp, fp, fn) in sorted(counts.items())
    ]
    known = [iou for iou in ious.values() if iou is not None]
    assert record["mean_iou"] == pytest.approx(sum(known) / len(known))
    assert (record["images"], record["ok"], record["errors"]) == (
        90,
        90 - kinds.total(),
        kinds.total(),
    )
    assert (record["label_errors"], record["shards"]) == (label_errors, 9)
    assert record["started_at"] == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert json.loads(record["arguments"]) == {"images": "s3://b", "scales": [1.0]}
    assert {name: record[name] for name in FACTS} == FACTS


def test_a_run_without_labels_has_no_iou(finalizer_for: FinalizerFor, tmp_path: Path) -> None:
    record = _record(*finalizer_for(str(tmp_path), rows_of(10, labels="none", errors="none")))
    assert (record["mean_iou"], record["class_iou"], record["errors_by_kind"]) == (None, [], [])


def test_a_run_with_only_error_rows_is_finalized_like_any_other(
    finalizer_for: FinalizerFor, tmp_path: Path
) -> None:
    finalizer, layout = finalizer_for(str(tmp_path), rows_of(30, errors="all"))
    finalizer.write_classes()
    finalizer.write_done()
    record = _record(finalizer, layout)
    assert class_parts(layout) == []
    assert table_of(storage.read(layout.done)).num_rows == 30
    assert (record["images"], record["ok"], record["errors"], record["mean_iou"]) == (
        30,
        0,
        30,
        None,
    )


def test_the_record_of_a_run_without_images_is_readable(
    finalizer_for: FinalizerFor, tmp_path: Path
) -> None:
    finalizer, layout = finalizer_for(str(tmp_path), [])
    record = _record(finalizer, layout)
    assert (record["images"], record["class_iou"]) == (0, [])


def test_foreign_files_beside_those_of_a_run_are_ignored_and_kept(
    finalizer_for: FinalizerFor, prefix: str
) -> None:
    rows = rows_of(40)
    layout = RunLayout(results=f"{prefix}/o'results [1]", run_id="r")
    ours = (layout.images, layout.classes, layout.done_parts)
    strays = [
        f"{folder}/{name}"
        for folder in ours
        for name in ("_SUCCESS", "README.txt", "old/part-00000.parquet", "old/shard-000000.parquet")
    ]
    for stray in strays:
        storage.write(stray, b"of the user")
    finalizer, _ = finalizer_for(prefix, rows)
    finalizer.write_classes()
    finalizer.write_done()
    written = _record(finalizer, layout)["bytes_written"]
    found = [item for folder in ours for item in storage.list_objects(folder)]
    last = len(storage.read(layout.done))
    assert written == last + sum(item.size for item in found if item.uri not in strays)
    assert {item.uri for item in found}.issuperset(strays)
    assert tuples_of(table_of(storage.read(layout.class_part(0)))) == sorted_classes(rows)


def test_no_temporary_files_are_left_on_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    finalizer, layout = make_finalizer(str(tmp_path), rows_of(30))
    with finalizer:
        assert os.listdir(tmp_path / "temporary")
    assert os.listdir(tmp_path / "temporary") == []
    storage.write(f"{layout.images}/shard-00000009.parquet", b"no Parquet")
    with pytest.raises(Exception, match="shard-00000009"), finalizer:
        pass
    assert os.listdir(tmp_path / "temporary") == []


def test_ctrl_c_during_a_query_releases_the_lease_and_says_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(tmp_path / "lease.json")

    def end_of_a_run() -> str:
        with lease.hold(uri, "a"), files.connect("/nowhere") as con, files.storage_errors("/x"):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            con.execute("select count(*) from (from range(600000000) order by hash(range))")
        return "not reached"

    resume = "interrupted; the same command resumes the run"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    started = time.monotonic()
    try:
        code = run_job(
            "segment",
            end_of_a_run,
            expected=(OSError,),
            interrupted=resume,
            on_signal=files.interrupt_queries,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert code == 1
    assert time.monotonic() - started < 30  # the query takes minutes
    assert capsys.readouterr().out == f'segment failed exit=1 reason="{resume}"\n'
    assert not storage.exists(uri)
