"""Finalize a run: write `classes`, `done` and the record from the committed `images` files.

Each output is a deterministic function of those files (except the record's times), so a driver that
takes over here writes the same bytes. A driver with other library versions may write other bytes;
it replaces existing parts, so that all of them are from one driver. The rows, without masks, are
loaded once into a database on local disk, where sorts spill under a memory limit. The record is
written last: a run with a record is finished, and readers ignore the `classes` of other runs.
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

_MEMORY_LIMIT = "600MB"  # for DuckDB, in addition to Python and Arrow

_COLUMNS = pa.schema(
    [
        tables.IMAGES.field(name)
        for name in dict.fromkeys([*tables.DONE.names, "label_error", "classes"])
    ]
)
"""Columns of `images` that are loaded."""

_COUNTS = """
    select count(*) as images, count(*) filter (status = 'ok') as ok,
           count(*) filter (status = 'error') as errors, count(label_error) as label_errors
    from images
"""
_KINDS = """
    select error_kind as kind, count(*) as images from images
    where status = 'error' group by all order by images desc, kind
"""
# a total order: a URI has one row per run, and at most one entry per class
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
    """Counts over all rows of a run."""

    images: int
    ok: int
    errors: int
    label_errors: int
    errors_by_kind: tuple[tuple[str, int], ...]


def load_outcome(layout: RunLayout) -> Outcome:
    """Return the counts in a finished run's record. Raises RunStoppedError if it is corrupt."""
    hint = "delete it, and run the same command again to finalize the run again"
    return read_artifact(layout.record, _parse_record, hint=hint)


def _parse_record(data: bytes) -> Outcome:
    [row] = pq.read_table(io.BytesIO(data)).to_pylist()
    return Outcome(
        images=row["images"],
        ok=row["ok"],
        errors=row["errors"],
        label_errors=row["label_errors"],
        errors_by_kind=tuple((each["kind"], each["images"]) for each in row["errors_by_kind"]),
    )


class RunFinalizer:
    """The end of a run, made from its committed files; a context manager that loads their rows."""

    def __init__(self, layout: RunLayout, plan: Plan, classes: Classes) -> None:
        self._layout = layout
        self._plan = plan
        self._classes = classes

    def __enter__(self) -> RunFinalizer:
        results = self._layout.results
        shards = filter_shards(storage.list_objects(self._layout.images))
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="deeplab-finish-"))
            database = os.path.join(folder, "images.duckdb")
            self._con = files.connect(results, memory_limit=_MEMORY_LIMIT, database=database)
            stack.callback(self._con.close)
            files.load_table(self._con, "images", _COLUMNS, results, shards)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def outcome(self) -> Outcome:
        """Return the counts over all of the run's rows."""
        [counts] = self._con.execute(_COUNTS).fetchall()
        return Outcome(
            images=counts[0],
            ok=counts[1],
            errors=counts[2],
            label_errors=counts[3],
            errors_by_kind=tuple(self._con.execute(_KINDS).fetchall()),
        )

    def write_classes(self) -> None:
        """Write `classes/`: one row per image and class, by class and descending fraction.

        Files of an earlier driver are replaced if they differ. Raises RunStoppedError if another
        driver has finished the run, or if the files do not hold the rows of `images` afterwards.
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
        """Write `done/`: the keys that --only-new skips. They take effect with the last file."""
        found = self._con.sql(f"select {', '.join(tables.DONE.names)} from images order by uri")
        parts = parquet_writer.write_row_groups(
            found.to_arrow_reader(parquet_writer.ROW_GROUP), tables.DONE
        )
        last, written = next(parts), []
        for number, part in enumerate(parts):
            written.append(self._layout.done_part(number))
            storage.write(written[-1], last)
            last = part
        self._delete_others(self._layout.done_parts, written)
        storage.write(self._layout.done, last)

    def _put(self, uri: str, data: bytes) -> None:
        """Create the file, or replace one with other bytes."""
        if not storage.create(uri, data) and storage.read(uri) != data:
            self._check_unfinished()
            storage.write(uri, data)

    def _delete_others(self, folder: str, written: list[str]) -> None:
        """Delete the parts in the folder that were not written just now."""
        found = {item.uri for item in filter_parts(storage.list_objects(folder))}
        if others := sorted(found.difference(written)):
            self._check_unfinished()
            storage.delete(others, within=self._layout.results)

    def _check_unfinished(self) -> None:
        """Guard against a stale driver, which lost its lease and resumed; called before changes."""
        if storage.exists(self._layout.record):
            raise RunStoppedError(f"another driver has finished run {self._layout.run_id}")

    def _check_classes(self) -> None:
        """Check the number of rows that a reader would find, from the files' footers."""
        [(expected,)] = self._con.execute(_CLASS_ROWS).fetchall()
        parts = list(filter_parts(storage.list_objects(self._layout.classes)))
        results = self._layout.results
        with files.storage_errors(results), files.connect(results, parts) as con:
            rows = files.select_statement(con, tables.CLASSES, parts)
            [(found,)] = con.execute(f"select count(*) from ({rows})").fetchall()
        if found != expected:
            raise RunStoppedError(
                f"{self._layout.classes} holds {found} rows for {expected} classes of the images: "
                "did another program write or delete files there? Run the same command again to "
                "write them again"
            )

    def write_record(self, outcome: Outcome, facts: dict[str, Any]) -> None:
        """Write the run's record; `facts` are the columns that do not follow from its files."""
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
