"""DuckDB views over what the runs wrote: results in a bucket or a folder are asked in SQL.

What lies below the results URI is listed once, by `connect`; the views read exactly those files.
Finished runs answer `classes` from files sorted by class and fraction, so a filter on them touches
few row groups; unfinished runs answer from the nested column of their images.
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
    """An in-memory DuckDB with views over the results at `uri`: a snapshot of what lies there now.

    images   one row an image, all runs
    classes  one row an image and class, all runs
    runs     one row a finished run
    latest   of each uri the ok row of the newest run that has one, unfinished runs included
    iou      run_id, class_id, class_name, tp, fp, fn, iou: per run over all images with a label

    Which files there are and which runs are finished is looked up once: what is written later
    shows in the next connection. With `run_id` they are those of that run alone. `memory_limit`
    is DuckDB's ("2GB"); beyond it queries spill to the temporary folder. Raises FileNotFoundError
    where nothing lies at `uri`, ValueError where `uri` or `run_id` is none or a plan there is
    broken, StorageError where storage refuses.
    """
    results = storage.normalize(uri)
    snapshot = _look(results, run_id)
    con = files.connect(results, snapshot.files, memory_limit=memory_limit)
    for name, select in _views(con, snapshot).items():
        con.execute(f"CREATE VIEW {name} AS {select}")
    return con


def run_records(results: str, run_id: str | None = None) -> list[storage.Object]:
    """The files of finished runs, each one row of `runs`, or that of one run."""
    return [item for item in _listed(results, "runs", run_id) if item.uri.endswith(".parquet")]


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """The files of one listing, and when each unfinished run started (None: its plan is gone)."""

    records: list[storage.Object]
    classes: list[storage.Object]  # of finished runs
    images: list[storage.Object]
    unfinished: list[storage.Object]  # those images that are of unfinished runs
    started: dict[str, datetime | None]

    @property
    def files(self) -> list[storage.Object]:
        return [*self.records, *self.classes, *self.images]


def _look(results: str, run_id: str | None) -> _Snapshot:
    """What lies at `results`. Records come first: a run that has one has all of its other files."""
    found = run_records(results, run_id)
    finished = {layout.run_id_of(results, item.uri) for item in found}
    classes = [
        item
        for item in layout.filter_parts(_listed(results, "classes", run_id))
        if layout.run_id_of(results, item.uri) in finished
    ]
    images = list(layout.filter_shards(_listed(results, "images", run_id)))
    if not (found or images) and next(storage.list_objects(results), None) is None:
        raise FileNotFoundError(f"no results lie at {results}")
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
    """The objects of a folder, or those of one run in it, in the order of their names."""
    if run_id is None:
        return sorted(storage.list_objects(storage.join(results, folder)))
    run = layout.RunLayout(results=results, run_id=run_id)
    if folder == "runs":
        record = storage.stat_object(run.record)
        return [record] if record else []
    return sorted(storage.list_objects({"images": run.images, "classes": run.classes}[folder]))


def _started(run: layout.RunLayout) -> datetime | None:
    """When the plan of an unfinished run was made; None where it has none (any more)."""
    uri = storage.join(run.plan, "plan.json")
    try:
        started = datetime.fromisoformat(json.loads(storage.read(uri))["started_at"])
    except storage.StorageError as error:
        if error.kind == "vanished":
            return None
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{uri} does not say when its run started: {error!r:.200}") from None
    if started.tzinfo is None:
        raise ValueError(f"{uri} says that its run started at {started}, without a UTC offset")
    return started


def _views(con: duckdb.DuckDBPyConnection, snapshot: _Snapshot) -> dict[str, str]:
    """The SELECT behind each view, in an order in which each finds those that it uses."""
    images = files.select_statement(con, tables.IMAGES, snapshot.images)
    finished = files.select_statement(con, tables.CLASSES, snapshot.classes)
    unfinished = _unnested(files.select_statement(con, tables.IMAGES, snapshot.unfinished))
    return {
        "images": images,
        "classes": f"{finished} UNION ALL {unfinished}" if snapshot.unfinished else finished,
        "runs": files.select_statement(con, tables.RUNS, snapshot.records, grown=True),
        "latest": _latest(snapshot.started),
        "iou": _IOU,
    }


def _unnested(images: str) -> str:
    nested = {field.name for field in tables.IMAGES.field("classes").type.value_type}
    columns = [f"class.{name}" if name in nested else name for name in tables.CLASSES.names]
    rows = f"SELECT uri, run_id, unnest(classes) AS class FROM ({images})"
    return f"SELECT {', '.join(columns)} FROM ({rows})"


# masks are wide: which rows are the newest is decided on narrow columns alone
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


# counts are added up first, the ratio is derived last; NULL where the union is 0
_IOU = """
    SELECT run_id, class_id, class_name,
        sum(tp)::BIGINT AS tp, sum(fp)::BIGINT AS fp, sum(fn)::BIGINT AS fn,
        sum(tp)::DOUBLE / nullif(sum(tp + fp + fn), 0)::DOUBLE AS iou
    FROM classes WHERE tp IS NOT NULL GROUP BY run_id, class_id, class_name"""
