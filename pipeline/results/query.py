"""DuckDB views over the results of all runs in a bucket or folder.

`connect` lists the files once, and the views read exactly those. For finished runs, `classes` reads
files sorted by class and fraction, so a filter on them touches few row groups; for unfinished runs
it reads the nested column of `images`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import duckdb

from pipeline.data import storage
from pipeline.results import files, layout, tables


def connect(
    uri: str, *, run_id: str | None = None, memory_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB with views over a snapshot of the results at `uri`.

    images   one row per image, all runs
    classes  one row per image and class, all runs
    runs     one row per finished run
    latest   the latest successful row for each uri, unfinished runs included
    iou      run_id, class_id, class_name, tp, fp, fn, iou: per run over all labeled images

    Files are listed once: anything written later shows in the next connection. With `run_id`, the
    views cover that run alone. Beyond `memory_limit` (DuckDB's, such as "2GB") queries spill to the
    temporary folder. Raises FileNotFoundError if there is nothing at `uri`, ValueError if `uri` or
    `run_id` is malformed or a plan is corrupt, StorageError if storage refuses.
    """
    results = storage.normalize(uri)
    snapshot = _take_snapshot(results, run_id)
    con = files.connect(results, snapshot.files, memory_limit=memory_limit)
    for name, select in _views(con, snapshot).items():
        con.execute(f"CREATE VIEW {name} AS {select}")
    return con


def run_records(results: str, run_id: str | None = None) -> list[storage.Object]:
    """Return the record files of finished runs, one row of `runs` each, or that of one run."""
    return [item for item in _listed(results, "runs", run_id) if item.uri.endswith(".parquet")]


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """The files of one listing, and the start of each unfinished run (None if it has no plan)."""

    records: list[storage.Object]
    classes: list[storage.Object]  # of finished runs
    images: list[storage.Object]
    unfinished: list[storage.Object]  # the images of unfinished runs
    started: dict[str, datetime | None]

    @property
    def files(self) -> list[storage.Object]:
        return [*self.records, *self.classes, *self.images]


def _take_snapshot(results: str, run_id: str | None) -> _Snapshot:
    """List `results`. Records come first: a run with a record has all of its other files."""
    found = run_records(results, run_id)
    finished = {layout.run_id_of(results, item.uri) for item in found}
    classes = [
        item
        for item in layout.filter_parts(_listed(results, "classes", run_id))
        if layout.run_id_of(results, item.uri) in finished
    ]
    images = list(layout.filter_shards(_listed(results, "images", run_id)))
    if not (found or images) and next(storage.list_objects(results), None) is None:
        raise FileNotFoundError(f"no results at {results}; check the URI")
    unfinished = [item for item in images if layout.run_id_of(results, item.uri) not in finished]
    runs = sorted({run for item in unfinished if (run := layout.run_id_of(results, item.uri))})
    return _Snapshot(
        records=found,
        classes=classes,
        images=images,
        unfinished=unfinished,
        started={run: _started(layout.RunLayout(results=results, run_id=run)) for run in runs},
    )


def _listed(results: str, folder: str, run_id: str | None) -> list[storage.Object]:
    """Return the objects of a folder, or of one run in it, sorted by URI."""
    if run_id is None:
        return sorted(storage.list_objects(storage.join(results, folder)))
    run = layout.RunLayout(results=results, run_id=run_id)
    if folder == "runs":
        record = storage.stat_object(run.record)
        return [record] if record else []
    return sorted(storage.list_objects({"images": run.images, "classes": run.classes}[folder]))


def _started(run: layout.RunLayout) -> datetime | None:
    """Return when an unfinished run's plan was made, None if the plan does not exist."""
    uri = storage.join(run.plan, "plan.json")
    try:
        started = datetime.fromisoformat(json.loads(storage.read(uri))["started_at"])
    except storage.StorageError as error:
        if error.kind == "vanished":
            return None
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{uri} has no valid started_at: {error!r:.200}") from None
    if started.tzinfo is None:
        raise ValueError(f"{uri}: started_at {started} must have a UTC offset")
    return started


def _views(con: duckdb.DuckDBPyConnection, snapshot: _Snapshot) -> dict[str, str]:
    """Return the SELECT of each view; a view comes after those it uses."""
    images = files.select_statement(con, tables.IMAGES_COMMON, snapshot.images)
    finished = files.select_statement(con, tables.CLASSES, snapshot.classes)
    unfinished = _unnested(files.select_statement(con, tables.IMAGES_COMMON, snapshot.unfinished))
    return {
        "images": images,
        "classes": f"{finished} UNION ALL {unfinished}" if snapshot.unfinished else finished,
        "runs": files.select_statement(con, tables.RUNS, snapshot.records, allow_missing=True),
        "latest": _latest(snapshot.started),
        "iou": _IOU,
    }


def _unnested(images: str) -> str:
    nested = {field.name for field in tables.IMAGES.field("classes").type.value_type}
    columns = [f"class.{name}" if name in nested else name for name in tables.CLASSES.names]
    rows = f"SELECT uri, run_id, unnest(classes) AS class FROM ({images})"
    return f"SELECT {', '.join(columns)} FROM ({rows})"


# masks are wide, so the newest rows are found by narrow columns only
def _latest(unfinished: Mapping[str, datetime | None]) -> str:
    starts = ["SELECT run_id, started_at FROM runs"]
    for run_id, started in unfinished.items():
        at = files.quote(started.isoformat()) if started else "NULL"
        starts.append(f"SELECT {files.quote(run_id)}, {at}::TIMESTAMPTZ")
    return f"""
        WITH ages AS (
            SELECT run_id, row_number() OVER (ORDER BY started_at NULLS FIRST, run_id) AS age
            FROM ({" UNION ALL ".join(starts)})
        ), newest AS (
            SELECT uri, max(age) AS age FROM images JOIN ages USING (run_id)
            WHERE status = 'ok' GROUP BY uri
        )
        SELECT images.* FROM images JOIN ages USING (run_id)
        JOIN newest ON newest.uri = images.uri AND newest.age = ages.age
        WHERE status = 'ok'"""


# counts are summed first, the ratio is derived last; NULL if the union is 0
_IOU = """
    SELECT run_id, class_id, class_name,
        sum(tp)::BIGINT AS tp, sum(fp)::BIGINT AS fp, sum(fn)::BIGINT AS fn,
        sum(tp)::DOUBLE / nullif(sum(tp + fp + fn), 0)::DOUBLE AS iou
    FROM classes WHERE tp IS NOT NULL GROUP BY run_id, class_id, class_name"""
