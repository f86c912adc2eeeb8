"""The views over results agree with plain Python on the same rows."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import storage
from pipeline.results import tables
from pipeline.results.layout import RunLayout
from pipeline.results.query import connect
from tests.results.synthetic_runs import class_rows, image_row, rows_of, write_run

VIEWS = ("images", "classes", "runs", "latest", "iou")


def ask(results: str, sql: str) -> list[tuple[Any, ...]]:
    with connect(results) as con:
        return con.execute(sql).fetchall()


def test_iou_agrees_with_summing_the_rows_one_by_one(prefix: str) -> None:
    rows = write_run(prefix, "done") + write_run(prefix, "open", finished=False)
    added: dict[tuple[str, int], list[int]] = {}
    for row in class_rows(rows):
        if row["tp"] is not None:
            sums = added.setdefault((row["run_id"], row["class_id"]), [0, 0, 0])
            for i, name in enumerate(("tp", "fp", "fn")):
                sums[i] += row[name]
    expected = {
        key: (*sums, sums[0] / sum(sums) if sum(sums) else None) for key, sums in added.items()
    }
    assert expected["done", 4][3] is None  # an absent class is covered
    with connect(prefix) as con:
        found = con.execute("SELECT run_id, class_id, tp, fp, fn, iou FROM iou").fetchall()
        kinds = dict(con.execute("SELECT column_name, column_type FROM (DESCRIBE iou)").fetchall())
    assert {row[:2]: row[2:] for row in found} == expected
    assert len(found) == len(expected)
    assert [kinds[name] for name in ("tp", "fp", "fn", "iou")] == ["BIGINT"] * 3 + ["DOUBLE"]


def test_classes_are_equal_before_and_after_a_run_finishes(prefix: str) -> None:
    rows = write_run(prefix, "a", finished=False)
    sql = "SELECT * FROM classes ORDER BY uri, class_id"
    with connect(prefix) as con:
        open_types = con.sql(sql).types
        unfinished = con.execute(sql).fetchall()
        write_run(prefix, "a")
        assert con.execute(sql).fetchall() == unfinished  # a connection is a snapshot
    with connect(prefix) as con:
        assert con.sql(sql).types == open_types
        assert con.execute(sql).fetchall() == unfinished
        assert "class_id" in con.sql(sql).columns
    assert len(unfinished) == len(class_rows(rows)) > 0


def test_a_filter_on_classes_of_finished_runs_reads_no_images(tmp_path: Path) -> None:
    write_run(str(tmp_path), "a")
    [(_, plan)] = ask(
        str(tmp_path), "EXPLAIN SELECT uri FROM classes WHERE class_id = 2 AND fraction > 0.05"
    )
    assert plan.count("READ_PARQUET") == 1
    assert "UNNEST" not in plan
    scan = plan[plan.index("READ_PARQUET") :]
    assert "class_id = 2" in scan
    assert "fraction > 0.05" in scan


def test_latest_is_the_newest_ok_row_of_each_uri_by_start_time(prefix: str) -> None:
    old = [image_row(f"s3://p/{name}", "z-first") for name in "abc"]
    new = [
        image_row("s3://p/a", "m-second"),
        image_row("s3://p/b", "m-second", status="error", error_kind="timeout"),
    ]
    write_run(prefix, "z-first", [old], hour=0)
    write_run(prefix, "m-second", [new], hour=1)
    write_run(prefix, "a-third", [[image_row("s3://p/d", "a-third")]], hour=2, finished=False)
    unplanned = [image_row(f"s3://p/{name}", "zz") for name in "ae"]
    storage.write(
        RunLayout(results=prefix, run_id="zz").shard(0),
        tables.rows_to_parquet(unplanned, tables.IMAGES),
    )
    assert ask(prefix, "SELECT uri, run_id, mask FROM latest ORDER BY uri") == [
        ("s3://p/a", "m-second", b"\x89PNG\x00"),
        ("s3://p/b", "z-first", b"\x89PNG\x00"),
        ("s3://p/c", "z-first", b"\x89PNG\x00"),
        ("s3://p/d", "a-third", b"\x89PNG\x00"),
        ("s3://p/e", "zz", b"\x89PNG\x00"),
    ]


def test_start_times_with_different_utc_offsets_are_compared(prefix: str) -> None:
    write_run(prefix, "late", [[image_row("s3://p/a", "late")]], hour=1)
    write_run(prefix, "open", [[image_row("s3://p/a", "open")]], finished=False)
    plan = f"{RunLayout(results=prefix, run_id='open').plan}/plan.json"
    storage.write(plan, b'{"started_at": "2026-01-01T14:30:00+02:00", "parts": []}')  # 12:30 UTC
    assert ask(prefix, "SELECT run_id FROM latest") == [("late",)]


def test_empty_results_have_views_with_the_same_columns_and_types(tmp_path: Path) -> None:
    full, empty = str(tmp_path / "full"), str(tmp_path / "empty")
    write_run(full, "a")
    storage.write(f"{empty}/leases/run=a.json", b"{}")
    with connect(full) as some, connect(empty) as none:
        for view in VIEWS:
            described = f"SELECT column_name, column_type FROM (DESCRIBE {view})"
            expected = some.execute(described).fetchall()
            assert none.execute(described).fetchall() == expected
            assert none.execute(f"SELECT * FROM {view}").fetchall() == []


def test_a_finished_run_without_classes_has_no_rows_in_classes(prefix: str) -> None:
    write_run(prefix, "a", [[image_row("s3://p/a", "a")]])
    assert ask(prefix, "SELECT * FROM classes") == []
    assert ask(prefix, "SELECT run_id FROM runs") == [("a",)]


def test_a_prefix_without_results_is_an_error_that_names_it(prefix: str) -> None:
    with pytest.raises(FileNotFoundError, match=prefix):
        connect(prefix)


def test_a_plan_without_a_start_time_is_an_error_that_names_it(prefix: str) -> None:
    write_run(prefix, "a", finished=False)
    plan = f"{RunLayout(results=prefix, run_id='a').plan}/plan.json"
    for broken in (b"{}", b"half", b'{"started_at": "2026-01-01T00:00:00"}'):
        storage.write(plan, broken)
        with pytest.raises(ValueError, match=r"run=a/plan\.json"):
            connect(prefix)


@pytest.mark.parametrize("name", ["it's [here]*", "[!a]?", "{a,b} 100%", "**", "run=b"])
def test_special_characters_in_the_results_uri_are_literal(prefix: str, name: str) -> None:
    rows = write_run(f"{prefix}/{name}", "a")
    write_run(f"{prefix}/it's h-other", "b")  # what a pattern would match too
    write_run(f"{prefix}/other", "b")
    assert ask(f"{prefix}/{name}", "SELECT run_id, count(*) FROM images GROUP BY ALL") == [
        ("a", len(rows))
    ]
    assert ask(f"{prefix}/{name}", "SELECT count(*) FROM classes") == [(len(class_rows(rows)),)]


def test_a_run_id_that_looks_like_a_date_stays_text(prefix: str) -> None:
    write_run(prefix, "2026-01-01", [rows_of("2026-01-01")])
    assert ask(prefix, "SELECT DISTINCT run_id FROM images") == [("2026-01-01",)]


def test_files_that_are_not_results_are_skipped(prefix: str) -> None:
    write_run(prefix, "a")
    for stray in ("images/run=a/.shard-000000.parquet.swp", "classes/run=a/_SUCCESS", "runs/x.txt"):
        storage.write(f"{prefix}/{stray}", b"stray")
    storage.write(f"{prefix}/classes/run=open/part-00000.parquet", b"half a run")
    assert ask(prefix, "SELECT count(*) > 0 FROM classes") == [(True,)]
    assert len(ask(prefix, "SELECT * FROM images")) == 12


def test_extensions_are_not_installed_and_times_are_utc(tmp_path: Path) -> None:
    write_run(str(tmp_path), "a")
    sql = "SELECT current_setting('autoinstall_known_extensions'), started_at::VARCHAR FROM runs"
    assert ask(str(tmp_path), sql) == [(False, "2026-01-01 12:00:00+00")]


@pytest.mark.s3
def test_a_query_on_s3_sends_no_request_but_for_data(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(s3_prefix, "a")
    remote = storage.filesystem(s3_prefix)
    assert remote is not None
    sent = []
    call = remote._call_s3

    async def counted(method: str, *arguments: Any, **more: Any) -> Any:
        sent.append(method)
        return await call(method, *arguments, **more)

    monkeypatch.setattr(remote, "_call_s3", counted)
    ask(s3_prefix, "SELECT sum(octet_length(mask)) FROM images")
    assert set(sent) == {"get_object"}


def test_a_result_can_be_converted_to_arrow(tmp_path: Path) -> None:
    write_run(str(tmp_path), "a")
    with connect(str(tmp_path)) as con:
        table = con.sql("SELECT * FROM images").to_arrow_table()
    assert table.schema.field("mask").type == pa.binary()


@pytest.mark.s3
def test_a_process_that_queried_s3_exits_without_output(s3_prefix: str) -> None:
    write_run(s3_prefix, "a")
    code = (
        "import sys; from pipeline.results.query import connect\n"
        "con = connect(sys.argv[1]); con.execute('SELECT * FROM images').fetchall(); con.close()"
    )
    command = [sys.executable, "-c", code, s3_prefix]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")


def test_the_times_of_runs_have_a_utc_offset_in_python(prefix: str) -> None:
    write_run(prefix, "done")
    [(started, finished)] = ask(prefix, "SELECT started_at, finished_at FROM runs")
    assert started.utcoffset() is not None
    assert started <= finished


def test_records_of_versions_with_fewer_columns_are_read_beside_current_ones(
    prefix: str,
) -> None:
    write_run(prefix, "old", hour=0)
    uri = RunLayout(results=prefix, run_id="old").record
    table = pq.read_table(io.BytesIO(storage.read(uri)))
    added = {"bytes_written", "actor_seconds", "gpu_seconds", "price_per_gpu_hour", "cost"}
    added |= {"inventory", "inventory_etag", "wait_seconds", "infer_seconds"}
    old = table.drop_columns(sorted(added))
    assert old.column_names == table.column_names[: -len(added)]
    storage.write(uri, tables.table_to_parquet(old))
    question = "SELECT run_id, shards, bytes_written, inventory FROM runs ORDER BY run_id DESC"
    assert ask(prefix, question) == [("old", 0, None, None)]
    write_run(prefix, "new", hour=1)
    assert ask(prefix, question) == [("old", 0, None, None), ("new", 0, 0, None)]
    assert ask(prefix, "SELECT * FROM runs LIMIT 0") == []
