"""The `classes` table of a run equals a plain sort of its shards' rows in Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.bulk.driver import parquet_writer
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.results import files, tables
from pipeline.runs.ray_connection import RunStoppedError
from tests.bulk.made_runs import (
    FinalizerFor,
    Rows,
    class_parts,
    rows_of,
    sorted_classes,
    table_of,
    tuples_of,
)


def test_classes_equal_a_plain_sort(finalizer_for: FinalizerFor, prefix: str) -> None:
    rows = rows_of(60)
    finalizer, layout = finalizer_for(prefix, rows)
    finalizer.write_classes()
    [part] = class_parts(layout)
    table = table_of(part)
    assert tuples_of(table) == sorted_classes(rows)
    assert table.schema.equals(tables.CLASSES, check_metadata=False)
    assert tables.classes_from_footer(table.schema.metadata) == VOC


def test_many_classes_are_written_as_several_parts_sorted_over_all(
    finalizer_for: FinalizerFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_writer, "PART_BYTES", 20_000)
    monkeypatch.setattr(parquet_writer, "ROW_GROUP", 1000)
    rows = rows_of(900, classes=19)
    finalizer, layout = finalizer_for(str(tmp_path), rows)
    finalizer.write_classes()
    found = class_parts(layout)
    assert len(found) > 2
    assert all(len(part) >= 20_000 for part in found[:-1])
    assert [row for part in found for row in tuples_of(table_of(part))] == sorted_classes(rows)
    finalizer.write_classes()
    assert class_parts(layout) == found


def _with_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Give DuckDB this number of threads from now on, as on another machine."""
    connect: Callable[..., Any] = files.connect

    def connected(*args: Any, **how: Any) -> Any:
        con = connect(*args, **how)
        con.execute(f"set threads = {threads}")
        return con

    monkeypatch.setattr(files, "connect", connected)


def _many_rows() -> Rows:
    """Return rows with more classes than two of DuckDB's row groups, in few images and files."""
    draw = random.Random(0)
    rows = rows_of(9000, errors="none", classes=2)
    for row in rows:
        found = [{"class_id": c, "fraction": draw.random()} for c in range(21)]
        row |= {"shard": row["bytes"] // 1000, "classes": found}
    return rows


def _keys(rows: Rows) -> list[tuple[int, float, str]]:
    """Return class, fraction and URI of the expected `classes` table."""
    flat = [(row["uri"], each) for row in rows for each in row["classes"]]
    keys = [(each["class_id"], float(np.float32(each["fraction"])), uri) for uri, each in flat]
    return sorted(keys, key=lambda key: (key[0], -key[1], key[2].encode()))


@pytest.mark.slow
def test_another_number_of_threads_continues_the_parts_of_a_killed_driver(
    finalizer_for: FinalizerFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_writer, "PART_BYTES", 100_000)
    monkeypatch.setattr(parquet_writer, "ROW_GROUP", 11_000)
    rows = _many_rows()
    left, create = [8], storage.create

    def until_interrupted(uri: str, data: bytes) -> bool:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return create(uri, data)

    with monkeypatch.context() as patch:
        _with_threads(patch, 1)
        patch.setattr(storage, "create", until_interrupted)
        finalizer, layout = finalizer_for(str(tmp_path), rows)
        with pytest.raises(KeyboardInterrupt):
            finalizer.write_classes()
    killed = class_parts(layout)
    assert len(killed) == 8
    _with_threads(monkeypatch, 4)
    finalizer_for(str(tmp_path), rows)[0].write_classes()
    ended = class_parts(layout)
    assert ended[:8] == killed
    columns = [table_of(part).select(["class_id", "fraction", "uri"]).columns for part in ended]
    found = [key for part in columns for key in zip(*(c.to_pylist() for c in part), strict=True)]
    assert found == _keys(rows)


def _classes_of(rows: Rows) -> bytes:
    table = pa.Table.from_pylist(rows, schema=tables.CLASSES)
    return tables.table_to_parquet(table)


@pytest.mark.parametrize("errors", ["some", "all"])
def test_parts_of_another_version_are_replaced_or_deleted(
    finalizer_for: FinalizerFor, prefix: str, errors: str
) -> None:
    rows = rows_of(60, errors=errors)
    finalizer, layout = finalizer_for(prefix, rows)
    stale = _classes_of([{"uri": "s3://b/twice", "run_id": "r", "class_id": 1}])
    for number in (0, 1, 7):
        storage.write(layout.class_part(number), stale)
    for number in (0, 3):
        storage.write(layout.done_part(number), b"of a version with other part boundaries")
    finalizer.write_classes()
    finalizer.write_done()
    found = [row for part in class_parts(layout) for row in tuples_of(table_of(part))]
    assert found == sorted_classes(rows)
    assert list(storage.list_objects(layout.done_parts)) == []


def test_a_stale_driver_replaces_no_parts_of_a_finished_run(
    finalizer_for: FinalizerFor, prefix: str
) -> None:
    finalizer, layout = finalizer_for(prefix, rows_of(30))
    storage.write(layout.class_part(0), b"of another version")
    storage.write(layout.record, b"of that one's driver")
    with pytest.raises(RunStoppedError, match="another driver has finished run r"):
        finalizer.write_classes()
    assert class_parts(layout) == [b"of another version"]


@pytest.mark.parametrize("lose", [True, False])
def test_missing_or_surplus_rows_in_the_parts_stop_the_run(
    finalizer_for: FinalizerFor, prefix: str, monkeypatch: pytest.MonkeyPatch, lose: bool
) -> None:
    rows = rows_of(30)
    finalizer, layout = finalizer_for(prefix, rows)
    create = storage.create

    def another_writes(uri: str, data: bytes) -> bool:
        if not lose:
            create(f"{layout.classes}/part-99999.parquet", data)
        return lose or create(uri, data)

    monkeypatch.setattr(storage, "create", another_writes)
    monkeypatch.setattr(storage, "delete", lambda *_, **__: None)
    wanted = len(sorted_classes(rows))
    found = 0 if lose else 2 * wanted
    with pytest.raises(RunStoppedError, match=f"holds {found} rows for {wanted} classes"):
        finalizer.write_classes()


def test_columns_that_are_all_null_keep_their_types(
    finalizer_for: FinalizerFor, tmp_path: Path
) -> None:
    rows = rows_of(10, labels="none", errors="none")
    finalizer, layout = finalizer_for(str(tmp_path), rows)
    finalizer.write_classes()
    finalizer.write_done()
    [part] = class_parts(layout)
    assert table_of(part).schema.equals(tables.CLASSES, check_metadata=False)
    done = table_of(storage.read(layout.done))
    assert done.schema.equals(tables.DONE, check_metadata=False)
    assert set(done["error_kind"].to_pylist()) == set(done["label_etag"].to_pylist()) == {None}


def test_files_are_loaded_a_few_at_a_time(
    finalizer_for: FinalizerFor, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FILES_PER_QUERY", 4)  # of 9 files
    rows = rows_of(90)
    finalizer, layout = finalizer_for(prefix, rows)
    finalizer.write_classes()
    [part] = class_parts(layout)
    assert finalizer.outcome().images == 90
    assert tuples_of(table_of(part)) == sorted_classes(rows)
