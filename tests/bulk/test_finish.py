"""The end of a run is a pure function of its shards; plain Python counts and sorts again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bulk import parts
from pipeline.bulk.finish import Finish, Outcome
from pipeline.bulk.plan import Counts, Plan
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.results import files, tables
from pipeline.results.layout import RunLayout
from pipeline.runs.cluster import RunStoppedError

Rows = list[dict[str, Any]]

FACTS = {
    "checkpoint": "/c.safetensors",
    "checkpoint_sha256": "0" * 64,
    "code_version": "1",
    "bytes_read": 7,
    "seconds": 2.0,
    "images_per_second": None,
}


def _class(c: int, draw: random.Random, *, labelled: bool) -> dict[str, Any]:
    tp, fp, fn = (draw.choice([0, 0, draw.randrange(1000)]) for _ in range(3))
    scores = {"tp": tp, "fp": fp, "fn": fn, "iou": tp / (tp + fp + fn) if tp + fp + fn else None}
    pixels = draw.choice([0, draw.randrange(1, 10_000)])
    return {
        "class_id": c,
        "class_name": VOC.names[c],
        "pixels": pixels,
        # few values, so that many are equal and the uri decides
        "fraction": draw.choice([0.1, 0.25, 1 / 3, draw.random()]),
        "confidence": draw.random() if pixels else None,
        **(scores if labelled else {}),
    }


def _rows(count: int, *, labels: str = "some", errors: str = "some", classes: int = 6) -> Rows:
    draw = random.Random(count)
    rows: Rows = []
    for i in range(count):
        row: dict[str, Any] = {"uri": f"s3://b/{i * 7919 % count:05d} é'.jpg", "etag": f"e{i}"}
        row |= {"bytes": i, "run_id": "r", "shard": i // 10, "model": "m", "settings": "s"}
        if errors == "all" or (errors == "some" and i % 7 == 3):
            kind = draw.choice(["truncated", "empty", "timeout"])
            rows.append({**row, "status": "error", "error_kind": kind, "error": "no"})
            continue
        labelled = labels == "some" and i % 3 > 0
        found = draw.sample(range(21), draw.randrange(1, classes))
        row |= {"status": "ok", "height": 5, "width": 7, "mask": b"png", "confidence": 0.5}
        row |= {"label_uri": "l", "label_etag": "x"} if labelled else {}
        row |= {"label_error": "of another size"} if labels == "some" and i % 9 == 0 else {}
        row["classes"] = [_class(c, draw, labelled=labelled) for c in sorted(found)]
        rows.append(row)
    return rows


Made = Callable[[str, Rows], tuple[Finish, RunLayout]]


@pytest.fixture
def finish_of() -> Iterator[Made]:
    """Makes the files of a run of these rows below a prefix; the end of that run, opened."""
    with contextlib.ExitStack() as opened:

        def made(prefix: str, rows: Rows) -> tuple[Finish, RunLayout]:
            finishing, layout = _finish(prefix, rows)
            return opened.enter_context(finishing), layout

        yield made


def _finish(prefix: str, rows: Rows) -> tuple[Finish, RunLayout]:
    layout = RunLayout(results=f"{prefix}/o'results [1]", run_id="r")
    schema = tables.with_footer(tables.IMAGES, VOC)
    for shard in {row["shard"] for row in rows}:
        mine = [row for row in rows if row["shard"] == shard]
        storage.write(layout.shard(shard), tables.to_parquet(mine, schema))
    plan = Plan(
        run_id="r",
        started_at="2026-01-02T03:04:05+00:00",
        fingerprint="f",
        identity={"images": "s3://b", "scales": [1.0]},
        model="m",
        settings="s",
        counts=Counts(images=len(rows), shards=len({row["shard"] for row in rows})),
    )
    return Finish(layout, plan, VOC), layout


def _parts(layout: RunLayout) -> list[bytes]:
    return [
        storage.read(uri) for uri in sorted(o.uri for o in storage.list_objects(layout.classes))
    ]


def _table(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


def _sorted_classes(rows: Rows) -> list[tuple[Any, ...]]:
    """The `classes` table by hand, floats as float32 holds them."""
    nested = tables.IMAGES.field("classes").type.value_type
    names = [nested.field(i).name for i in range(nested.num_fields)]
    flat = [
        (row["uri"], "r", *(each.get(name) for name in names))
        for row in rows
        for each in row.get("classes") or []
    ]
    flat = [
        tuple(float(np.float32(value)) if isinstance(value, float) else value for value in row)
        for row in flat
    ]
    return sorted(flat, key=lambda row: (row[2], -row[5], row[0].encode()))


def _tuples(table: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in table.to_pylist()]


def test_classes_equal_a_plain_sort(finish_of: Made, prefix: str) -> None:
    rows = _rows(60)
    finishing, layout = finish_of(prefix, rows)
    finishing.write_classes()
    [part] = _parts(layout)
    table = _table(part)
    assert _tuples(table) == _sorted_classes(rows)
    assert table.schema.equals(tables.CLASSES, check_metadata=False)
    assert tables.classes_of(table.schema.metadata) == VOC


def test_many_classes_become_several_parts_each_readable_and_sorted_over_all(
    finish_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    monkeypatch.setattr(parts, "ROW_GROUP", 1000)
    rows = _rows(900, classes=19)
    finishing, layout = finish_of(str(tmp_path), rows)
    finishing.write_classes()
    found = _parts(layout)
    assert len(found) > 2
    assert all(len(part) >= 20_000 for part in found[:-1])
    assert [row for part in found for row in _tuples(_table(part))] == _sorted_classes(rows)
    finishing.write_classes()
    assert _parts(layout) == found


def _with_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """From now on DuckDB has so many, as on another machine."""
    connect: Callable[..., Any] = files.connect

    def connected(*args: Any, **how: Any) -> Any:
        con = connect(*args, **how)
        con.execute(f"set threads = {threads}")
        return con

    monkeypatch.setattr(files, "connect", connected)


def _many_rows() -> Rows:
    """More classes than two row groups of DuckDB's, in few photos and files."""
    draw = random.Random(0)
    rows = _rows(9000, errors="none", classes=2)
    for row in rows:
        found = [{"class_id": c, "fraction": draw.random()} for c in range(21)]
        row |= {"shard": row["bytes"] // 1000, "classes": found}
    return rows


def _keys(rows: Rows) -> list[tuple[int, float, str]]:
    """Class, falling fraction and uri of the `classes` table, by hand."""
    flat = [(row["uri"], each) for row in rows for each in row["classes"]]
    keys = [(each["class_id"], float(np.float32(each["fraction"])), uri) for uri, each in flat]
    return sorted(keys, key=lambda key: (key[0], -key[1], key[2].encode()))


def test_a_run_whose_driver_was_killed_among_the_parts_is_ended_with_other_threads(
    finish_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 100_000)
    monkeypatch.setattr(parts, "ROW_GROUP", 11_000)
    rows = _many_rows()
    left, create = [8], storage.create

    def until_killed(uri: str, data: bytes) -> bool:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return create(uri, data)

    with monkeypatch.context() as patch:
        _with_threads(patch, 1)
        patch.setattr(storage, "create", until_killed)
        finishing, layout = finish_of(str(tmp_path), rows)
        with pytest.raises(KeyboardInterrupt):
            finishing.write_classes()
    killed = _parts(layout)
    assert len(killed) == 8
    _with_threads(monkeypatch, 4)
    finish_of(str(tmp_path), rows)[0].write_classes()
    ended = _parts(layout)
    assert ended[:8] == killed
    columns = [_table(part).select(["class_id", "fraction", "uri"]).columns for part in ended]
    found = [key for part in columns for key in zip(*(c.to_pylist() for c in part), strict=True)]
    assert found == _keys(rows)


def _classes_of(rows: Rows) -> bytes:
    table = pa.Table.from_pylist(rows, schema=tables.CLASSES)
    return tables.table_to_parquet(table)


@pytest.mark.parametrize("errors", ["some", "all"])
def test_parts_that_another_version_cut_elsewhere_are_replaced_and_those_beyond_the_last_go(
    finish_of: Made, prefix: str, errors: str
) -> None:
    rows = _rows(60, errors=errors)
    finishing, layout = finish_of(prefix, rows)
    stale = _classes_of([{"uri": "s3://b/twice", "run_id": "r", "class_id": 1}])
    for number in (0, 1, 7):
        storage.write(layout.class_part(number), stale)
    for number in (0, 3):
        storage.write(layout.done_part(number), b"of one who cut the keys elsewhere")
    finishing.write_classes()
    finishing.write_done()
    found = [row for part in _parts(layout) for row in _tuples(_table(part))]
    assert found == _sorted_classes(rows)
    assert list(storage.list_objects(layout.done_parts)) == []


def test_a_driver_that_wakes_up_after_the_record_replaces_no_parts(
    finish_of: Made, prefix: str
) -> None:
    finishing, layout = finish_of(prefix, _rows(30))
    storage.write(layout.class_part(0), b"of another version")
    storage.write(layout.record, b"of that one's driver")
    with pytest.raises(RunStoppedError, match="another driver has ended run r"):
        finishing.write_classes()
    assert _parts(layout) == [b"of another version"]


@pytest.mark.parametrize("lose", [True, False])
def test_parts_that_do_not_hold_a_row_for_each_class_of_the_photos_stop_the_run(
    finish_of: Made, prefix: str, monkeypatch: pytest.MonkeyPatch, lose: bool
) -> None:
    rows = _rows(30)
    finishing, layout = finish_of(prefix, rows)
    create = storage.create

    def another_meddles(uri: str, data: bytes) -> bool:
        if not lose:
            create(f"{layout.classes}/part-99999.parquet", data)
        return lose or create(uri, data)

    monkeypatch.setattr(storage, "create", another_meddles)
    monkeypatch.setattr(storage, "delete", lambda *_, **__: None)
    wanted = len(_sorted_classes(rows))
    found = 0 if lose else 2 * wanted
    with pytest.raises(RunStoppedError, match=f"holds {found} rows for {wanted} classes"):
        finishing.write_classes()


def test_columns_that_are_all_null_keep_their_types(finish_of: Made, tmp_path: Path) -> None:
    rows = _rows(10, labels="none", errors="none")
    finishing, layout = finish_of(str(tmp_path), rows)
    finishing.write_classes()
    finishing.write_done()
    [part] = _parts(layout)
    assert _table(part).schema.equals(tables.CLASSES, check_metadata=False)
    done = _table(storage.read(layout.done))
    assert done.schema.equals(tables.DONE, check_metadata=False)
    assert set(done["error_kind"].to_pylist()) == set(done["label_etag"].to_pylist()) == {None}


def test_done_holds_the_key_of_every_row(finish_of: Made, prefix: str) -> None:
    rows = _rows(40)
    finishing, layout = finish_of(prefix, rows)
    finishing.write_done()
    names = tables.DONE.names
    in_order = sorted(rows, key=lambda row: str(row["uri"]))
    wanted = [tuple(row.get(name) for name in names) for row in in_order]
    assert _tuples(_table(storage.read(layout.done))) == wanted


def _done_files(layout: RunLayout) -> list[bytes]:
    """The files of `done` in their order: the parts, then the last one."""
    parts = sorted(item.uri for item in storage.list_objects(layout.done_parts))
    return [storage.read(uri) for uri in [*parts, layout.done]]


def test_done_of_many_photos_is_written_in_parts_of_which_the_last_comes_last(
    finish_of: Made, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(300)
    finishing, layout = finish_of(prefix, rows)
    monkeypatch.setattr(parts, "PART_BYTES", 1500)
    monkeypatch.setattr(parts, "ROW_GROUP", 50)
    written: list[str] = []
    write = storage.write

    def noted(uri: str, data: bytes) -> None:
        written.append(uri)
        write(uri, data)

    monkeypatch.setattr(storage, "write", noted)
    finishing.write_done()
    assert len(written) > 2
    assert written == [*map(layout.done_part, range(len(written) - 1)), layout.done]
    found = _done_files(layout)
    assert all(len(part) >= 1500 for part in found[:-1])
    in_order = sorted(rows, key=lambda row: str(row["uri"]).encode())
    wanted = [tuple(row.get(name) for name in tables.DONE.names) for row in in_order]
    assert [row for part in found for row in _tuples(_table(part))] == wanted
    finishing.write_done()
    assert _done_files(layout) == found


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_run_that_was_killed_while_it_wrote_done_is_not_done_and_ends_with_the_same_bytes(
    finish_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    finishing, layout = finish_of(str(tmp_path), _rows(300))
    monkeypatch.setattr(parts, "PART_BYTES", 1500)
    monkeypatch.setattr(parts, "ROW_GROUP", 50)
    finishing.write_done()
    whole = _done_files(layout)
    assert len(whole) > 2
    storage.delete([item.uri for item in storage.list_objects(f"{layout.results}/done")])
    left, write = [written], storage.write

    def until_killed(uri: str, data: bytes) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", until_killed)
        with pytest.raises(KeyboardInterrupt):
            finishing.write_done()
    assert not storage.exists(layout.done)
    assert len(list(storage.list_objects(layout.done_parts))) == written
    finishing.write_done()
    assert _done_files(layout) == whole


def _record(finishing: Finish, layout: RunLayout) -> dict[str, Any]:
    finishing.write_record(finishing.outcome(), FACTS)
    table = _table(storage.read(layout.record))
    assert table.schema.equals(tables.RUNS, check_metadata=False)
    [row] = table.to_pylist()
    assert isinstance(row, dict)
    return row


def test_the_records_numbers_equal_plain_counting(finish_of: Made, prefix: str) -> None:
    rows = _rows(90)
    finishing, layout = finish_of(prefix, rows)
    record = _record(finishing, layout)
    kinds = Counter(row["error_kind"] for row in rows if row["status"] == "error")
    by_count = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    label_errors = sum("label_error" in row for row in rows)
    assert finishing.outcome() == Outcome(
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


def test_a_run_without_labels_has_no_iou(finish_of: Made, tmp_path: Path) -> None:
    record = _record(*finish_of(str(tmp_path), _rows(10, labels="none", errors="none")))
    assert (record["mean_iou"], record["class_iou"], record["errors_by_kind"]) == (None, [], [])


def test_a_run_of_errors_alone_ends_like_any_other(finish_of: Made, tmp_path: Path) -> None:
    finishing, layout = finish_of(str(tmp_path), _rows(30, errors="all"))
    finishing.write_classes()
    finishing.write_done()
    record = _record(finishing, layout)
    assert _parts(layout) == []
    assert _table(storage.read(layout.done)).num_rows == 30
    assert (record["images"], record["ok"], record["errors"], record["mean_iou"]) == (
        30,
        0,
        30,
        None,
    )


def test_the_record_of_a_run_without_photos_can_be_read(finish_of: Made, tmp_path: Path) -> None:
    finishing, layout = finish_of(str(tmp_path), [])
    record = _record(finishing, layout)
    assert (record["images"], record["class_iou"]) == (0, [])


def test_files_are_gathered_some_at_a_time(
    finish_of: Made, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_TOGETHER", 4)  # of 9 files
    rows = _rows(90)
    finishing, layout = finish_of(prefix, rows)
    finishing.write_classes()
    [part] = _parts(layout)
    assert finishing.outcome().images == 90
    assert _tuples(_table(part)) == _sorted_classes(rows)


def test_a_run_ends_beside_files_that_are_not_its_own_and_leaves_them(
    finish_of: Made, prefix: str
) -> None:
    rows = _rows(40)
    layout = RunLayout(results=f"{prefix}/o'results [1]", run_id="r")
    ours = (layout.images, layout.classes, layout.done_parts)
    strays = [
        f"{folder}/{name}"
        for folder in ours
        for name in ("_SUCCESS", "README.txt", "old/part-00000.parquet", "old/shard-000000.parquet")
    ]
    for stray in strays:
        storage.write(stray, b"of a person")
    finishing, _ = finish_of(prefix, rows)
    finishing.write_classes()
    finishing.write_done()
    written = _record(finishing, layout)["bytes_written"]
    there = [item for folder in ours for item in storage.list_objects(folder)]
    last = len(storage.read(layout.done))
    assert written == last + sum(item.size for item in there if item.uri not in strays)
    assert {item.uri for item in there}.issuperset(strays)
    assert _tuples(_table(storage.read(layout.class_part(0)))) == _sorted_classes(rows)


def test_nothing_is_left_on_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    finishing, layout = _finish(str(tmp_path), _rows(30))
    with finishing:
        assert os.listdir(tmp_path / "temporary")
    assert os.listdir(tmp_path / "temporary") == []
    storage.write(f"{layout.images}/shard-00000009.parquet", b"no Parquet")
    with pytest.raises(Exception, match="shard-00000009"), finishing:
        pass
    assert os.listdir(tmp_path / "temporary") == []


@files.interruptible()
def _interrupted_query() -> None:
    with files.connect("/nowhere") as con:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        con.execute("select count(*) from (from range(60000000) order by hash(range))")


def test_an_interruption_of_a_query_is_one_of_the_run() -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted_query()
