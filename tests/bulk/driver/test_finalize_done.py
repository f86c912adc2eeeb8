"""`done` holds the key of each image, in parts; the last one takes effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.bulk.driver import parquet_writer
from pipeline.data import storage
from pipeline.results import tables
from pipeline.results.layout import RunLayout
from tests.bulk.made_runs import (
    FinalizerFor,
    make_finalizer,
    rows_of,
    table_of,
    tuples_of,
)


def test_done_holds_the_key_of_every_row(finalizer_for: FinalizerFor, prefix: str) -> None:
    rows = rows_of(40)
    finalizer, layout = finalizer_for(prefix, rows)
    finalizer.write_done()
    names = tables.DONE.names
    in_order = sorted(rows, key=lambda row: str(row["uri"]))
    wanted = [tuple(row.get(name) for name in names) for row in in_order]
    assert tuples_of(table_of(storage.read(layout.done))) == wanted


def test_done_keeps_format_versions_of_rows_by_several_versions(
    tmp_path: Path,
) -> None:
    rows = [row | {"format_version": index % 3 or None} for index, row in enumerate(rows_of(40))]
    finalizer, layout = make_finalizer(str(tmp_path), rows)
    shards = sorted(item.uri for item in storage.list_objects(layout.images))
    assert len(shards) > 2
    lacking = table_of(storage.read(shards[1])).drop_columns("format_version")
    storage.write(shards[1], tables.table_to_parquet(lacking))
    old = set(lacking["uri"].to_pylist())
    with finalizer:
        finalizer.write_done()
    done = table_of(storage.read(layout.done)).to_pylist()
    found = {row["uri"]: row["format_version"] for row in done}
    expected = {row["uri"]: None if row["uri"] in old else row["format_version"] for row in rows}
    assert found == expected


def _done_files(layout: RunLayout) -> list[bytes]:
    """Return the files of `done` in order: the parts, then the last one."""
    parts = sorted(item.uri for item in storage.list_objects(layout.done_parts))
    return [storage.read(uri) for uri in [*parts, layout.done]]


def test_done_of_many_images_is_written_in_parts_the_last_one_at_the_end(
    finalizer_for: FinalizerFor, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(300)
    finalizer, layout = finalizer_for(prefix, rows)
    monkeypatch.setattr(parquet_writer, "PART_BYTES", 1500)
    monkeypatch.setattr(parquet_writer, "ROW_GROUP", 50)
    written: list[str] = []
    write = storage.write

    def noted(uri: str, data: bytes) -> None:
        written.append(uri)
        write(uri, data)

    monkeypatch.setattr(storage, "write", noted)
    finalizer.write_done()
    assert len(written) > 2
    assert written == [*map(layout.done_part, range(len(written) - 1)), layout.done]
    found = _done_files(layout)
    assert all(len(part) >= 1500 for part in found[:-1])
    in_order = sorted(rows, key=lambda row: str(row["uri"]).encode())
    wanted = [tuple(row.get(name) for name in tables.DONE.names) for row in in_order]
    assert [row for part in found for row in tuples_of(table_of(part))] == wanted
    finalizer.write_done()
    assert _done_files(layout) == found


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_run_killed_while_writing_done_resumes_with_the_same_bytes(
    finalizer_for: FinalizerFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    finalizer, layout = finalizer_for(str(tmp_path), rows_of(300))
    monkeypatch.setattr(parquet_writer, "PART_BYTES", 1500)
    monkeypatch.setattr(parquet_writer, "ROW_GROUP", 50)
    finalizer.write_done()
    whole = _done_files(layout)
    assert len(whole) > 2
    storage.delete([item.uri for item in storage.list_objects(f"{layout.results}/done")])
    left, write = [written], storage.write

    def until_interrupted(uri: str, data: bytes) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            finalizer.write_done()
    assert not storage.exists(layout.done)
    assert len(list(storage.list_objects(layout.done_parts))) == written
    finalizer.write_done()
    assert _done_files(layout) == whole
