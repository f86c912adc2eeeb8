"""What a run writes at its end, from the committed `images` files alone: `classes`, `done`, record.

Each is a pure function of those files (the record's times aside), whatever the threads, so a run
that was killed here is ended by the next driver with the same bytes. One with other versions of
the libraries may write other bytes: it replaces what it finds, so that the parts are always of
one driver. The files' rows, masks aside, are gathered once in a database on local disk, where
sorts spill under a memory limit. The record comes last: a run with a record is finished, and of
one without, nobody reads `classes`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk.driver import parquet_writer
from pipeline.bulk.planning.plan import Plan
from pipeline.data import storage
from pipeline.data.labels import Classes
from pipeline.results import files, tables
from pipeline.results.layout import RunLayout, filter_parts, filter_shards
from pipeline.runs.artifacts import read_artifact
from pipeline.runs.ray_connection import RunStoppedError

_MEMORY_LIMIT = "600MB"  # beside what Python and Arrow take

_GATHERED = pa.schema(
    [
        tables.IMAGES.field(name)
        for name in dict.fromkeys([*tables.DONE.names, "label_error", "classes"])
    ]
)
"""Columns of `images` that the end of a run reads."""

_COUNTS = """
    select count(*) as images, count(*) filter (status = 'ok') as ok,
           count(*) filter (status = 'error') as errors, count(label_error) as label_errors
    from images
"""
_KINDS = """
    select error_kind as kind, count(*) as images from images
    where status = 'error' group by all order by images desc, kind
"""
# a total order: a uri is one row of a run, and has a class once
_CLASSES = """
    with rows as (select uri, run_id, unnest(classes, max_depth := 2) from images)
    select * from rows order by class_id, fraction desc, uri
"""
_CLASS_ROWS = "select coalesce(sum(len(classes)), 0)::bigint from images"
_SCORES = """
    with scores as (select unnest(classes, max_depth := 2) from images)
    select class_id, any_value(class_name) as class_name, sum(tp)::bigint as tp,
           sum(fp)::bigint as fp, sum(fn)::bigint as fn,
           sum(tp) / nullif(sum(tp + fp + fn), 0) as iou
    from scores where tp is not null group by class_id order by class_id
"""

_SCORE_NAMES = ("class_id", "class_name", "tp", "fp", "fn", "iou")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the files of a run hold."""

    images: int
    ok: int
    errors: int
    label_errors: int
    errors_by_kind: tuple[tuple[str, int], ...]


def load_outcome(layout: RunLayout) -> Outcome:
    """What the record of a finished run says that its files hold. Raises RunStoppedError."""
    again = "delete it, and the same command ends the run again"
    return read_artifact(layout.record, _recorded, hint=again)


def _recorded(data: bytes) -> Outcome:
    [row] = pq.read_table(io.BytesIO(data)).to_pylist()
    return Outcome(
        images=row["images"],
        ok=row["ok"],
        errors=row["errors"],
        label_errors=row["label_errors"],
        errors_by_kind=tuple((each["kind"], each["images"]) for each in row["errors_by_kind"]),
    )


class RunFinalizer:
    """The end of one run, over its committed files; as a context manager, which gathers them."""

    def __init__(self, layout: RunLayout, plan: Plan, classes: Classes) -> None:
        self._layout = layout
        self._plan = plan
        self._classes = classes

    def __enter__(self) -> RunFinalizer:
        results = self._layout.results
        shards = filter_shards(storage.list_objects(self._layout.images))
        with contextlib.ExitStack() as opened:
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="deeplab-finish-"))
            database = os.path.join(folder, "images.duckdb")
            self._con = files.connect(results, memory_limit=_MEMORY_LIMIT, database=database)
            opened.callback(self._con.close)
            files.load_table(self._con, "images", _GATHERED, results, shards)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def outcome(self) -> Outcome:
        """Counts over all of the run's rows."""
        [counts] = self._con.execute(_COUNTS).fetchall()
        return Outcome(
            images=counts[0],
            ok=counts[1],
            errors=counts[2],
            label_errors=counts[3],
            errors_by_kind=tuple(self._con.execute(_KINDS).fetchall()),
        )

    def write_classes(self) -> None:
        """`classes/`: a row an image and class, sorted by class and falling fraction.

        What an earlier driver left there is replaced where it differs. Raises RunStoppedError
        where another driver has ended the run, or the files do not hold the rows of `images`.
        """
        schema = tables.with_footer(tables.CLASSES, self._classes)
        reader = self._con.sql(_CLASSES).to_arrow_reader(parquet_writer.ROW_GROUP)
        written = []
        for number, part in enumerate(parquet_writer.write_row_groups(reader, schema)):
            written.append(self._layout.class_part(number))
            self._put(written[-1], part)
        self._delete_others(self._layout.classes, written)
        self._check_classes()

    def write_done(self) -> None:
        """`done/`: the keys of what later runs may leave out; the last file makes all count."""
        found = self._con.sql(f"select {', '.join(tables.DONE.names)} from images order by uri")
        files_of_done = parquet_writer.write_row_groups(
            found.to_arrow_reader(parquet_writer.ROW_GROUP), tables.DONE
        )
        last, written = next(files_of_done), []
        for number, part in enumerate(files_of_done):
            written.append(self._layout.done_part(number))
            storage.write(written[-1], last)
            last = part
        self._delete_others(self._layout.done_parts, written)
        storage.write(self._layout.done, last)

    def _put(self, uri: str, data: bytes) -> None:
        """Creates the file; where one is there that differs, replaces it."""
        if not storage.create(uri, data) and storage.read(uri) != data:
            self._check_unfinished()
            storage.write(uri, data)

    def _delete_others(self, folder: str, written: list[str]) -> None:
        """Deletes the parts in the folder that are none of those written."""
        there = {item.uri for item in filter_parts(storage.list_objects(folder))}
        if others := sorted(there.difference(written)):
            self._check_unfinished()
            storage.delete(others, within=self._layout.results)

    def _check_unfinished(self) -> None:
        """Before what is there is touched: a driver that lost its lease long ago may wake up."""
        if storage.exists(self._layout.record):
            raise RunStoppedError(f"another driver has ended run {self._layout.run_id}")

    def _check_classes(self) -> None:
        """Counts what a reader would find, by the files' footers."""
        [(wanted,)] = self._con.execute(_CLASS_ROWS).fetchall()
        there = list(filter_parts(storage.list_objects(self._layout.classes)))
        results = self._layout.results
        with files.storage_errors(results), files.connect(results, there) as con:
            rows = files.select_statement(con, tables.CLASSES, there)
            [(found,)] = con.execute(f"select count(*) from ({rows})").fetchall()
        if found != wanted:
            raise RunStoppedError(
                f"{self._layout.classes} holds {found} rows for {wanted} classes of the photos: "
                "did something else write or delete there? The same command writes it again"
            )

    def write_record(self, outcome: Outcome, facts: dict[str, Any]) -> None:
        """`runs/`: the run's record. `facts` are those that the files do not hold."""
        scores = self._con.execute(_SCORES).fetchall()
        ious = [iou for *_, iou in scores if iou is not None]
        row = {
            "run_id": self._plan.run_id,
            "started_at": datetime.fromisoformat(self._plan.started_at),
            "finished_at": datetime.now(UTC),
            "arguments": json.dumps(self._plan.identity),
            "model": self._plan.model,
            "settings": self._plan.settings,
            "images": outcome.images,
            "ok": outcome.ok,
            "errors": outcome.errors,
            "label_errors": outcome.label_errors,
            "shards": self._plan.counts.shards,
            "errors_by_kind": [
                {"kind": kind, "images": count} for kind, count in outcome.errors_by_kind
            ],
            "mean_iou": sum(ious) / len(ious) if ious else None,
            "class_iou": [dict(zip(_SCORE_NAMES, score, strict=True)) for score in scores],
            "inventory": self._plan.identity.get("inventory"),
            "inventory_etag": self._plan.inventory_etag,
            "bytes_written": self._bytes_written(),
            **facts,
        }
        schema = tables.with_footer(tables.RUNS, self._classes)
        storage.write(self._layout.record, tables.rows_to_parquet([row], schema))

    def _bytes_written(self) -> int:
        layout = self._layout
        sizes = sum(item.size for item in filter_shards(storage.list_objects(layout.images)))
        for folder in (layout.classes, layout.done_parts):
            sizes += sum(item.size for item in filter_parts(storage.list_objects(folder)))
        last = storage.stat_object(layout.done)
        return sizes + (last.size if last else 0)
