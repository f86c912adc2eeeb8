"""DuckDB views over what the runs wrote: results in a bucket or a folder are asked in SQL.

What lies below the results URI is listed once, by `connect`; the views read exactly those files.
Finished runs answer `classes` from files sorted by class and fraction, so a filter on them touches
few row groups; unfinished runs answer from the nested column of their images.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import duckdb
import fsspec
import pyarrow as pa

from pipeline.data import storage
from pipeline.results import layout, tables

_OFFLINE = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}

_READ_AHEAD_BYTES = 2**20
"""Of remote files: neighbouring columns come with one request, skipped row groups do not."""


def connect(uri: str, *, memory_limit: str | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with views over the results at `uri`: a snapshot of what lies there now.

    images   one row an image, all runs
    classes  one row an image and class, all runs
    runs     one row a finished run
    latest   of each uri the ok row of the newest run that has one, unfinished runs included
    iou      run_id, class_id, class_name, tp, fp, fn, iou: per run over all images with a label

    Which files there are and which runs are finished is looked up once: what is written later
    shows in the next connection. `memory_limit` is DuckDB's ("2GB"); beyond it queries spill to
    the temporary folder. Raises FileNotFoundError where nothing lies at `uri`, ValueError where
    `uri` is none or a plan there is broken, StorageError where storage refuses.
    """
    results = storage.normalise(uri)
    snapshot = _look(results)
    settings: dict[str, str | bool | int | float | list[str]] = {
        **_OFFLINE,
        "temp_directory": os.path.join(tempfile.gettempdir(), f"duckdb-{secrets.token_hex(8)}"),
        **({"memory_limit": memory_limit} if memory_limit else {}),
    }
    con = duckdb.connect(":memory:", config=settings)
    con.execute("SET TimeZone = 'UTC'; SET parquet_metadata_cache = true")
    if (remote := storage.filesystem(results)) is not None:
        con.register_filesystem(_Listed(remote, snapshot.files))
    for name, select in _views(con, snapshot).items():
        con.execute(f"CREATE VIEW {name} AS {select}")
    return con


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


def _look(results: str) -> _Snapshot:
    """What lies at `results`. Records come first: a run that has one has all of its other files."""
    records = [item for item in _listed(results, "runs") if item.uri.endswith(".parquet")]
    finished = {layout.run_of(results, item.uri) for item in records}
    classes = [
        item
        for item in _listed(results, "classes")
        if item.uri.endswith(".parquet") and layout.run_of(results, item.uri) in finished
    ]
    images = [
        item for item in _listed(results, "images") if layout.shard_number(item.uri) is not None
    ]
    if not (records or images) and next(storage.list_objects(results), None) is None:
        raise FileNotFoundError(f"no results lie at {results}")
    unfinished = [item for item in images if layout.run_of(results, item.uri) not in finished]
    runs = sorted({run for item in unfinished if (run := layout.run_of(results, item.uri))})
    return _Snapshot(
        records=records,
        classes=classes,
        images=images,
        unfinished=unfinished,
        started={run: _started(layout.RunLayout(results=results, run_id=run)) for run in runs},
    )


def _listed(results: str, folder: str) -> list[storage.Object]:
    return sorted(storage.list_objects(storage.join(results, folder)))


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
    images = _select(con, tables.IMAGES, snapshot.images)
    finished = _select(con, tables.CLASSES, snapshot.classes)
    unfinished = _unnested(_select(con, tables.IMAGES, snapshot.unfinished))
    return {
        "images": images,
        "classes": f"{finished} UNION ALL {unfinished}" if snapshot.unfinished else finished,
        "runs": _select(con, tables.RUNS, snapshot.records),
        "latest": _latest(snapshot.started),
        "iou": _IOU,
    }


def _select(
    con: duckdb.DuckDBPyConnection, schema: pa.Schema, files: Iterable[storage.Object]
) -> str:
    """The schema's columns of all rows of the files, be there any or none."""
    if uris := [_escaped(item.uri) for item in files]:
        listed = ", ".join(map(_quoted, uris))
        columns = ", ".join(schema.names)
        return f"SELECT {columns} FROM read_parquet([{listed}], hive_partitioning = false)"
    types = con.from_arrow(schema.empty_table()).types
    nulls = zip(types, schema.names, strict=True)
    return f"SELECT {', '.join(f'NULL::{kind} AS {name}' for kind, name in nulls)} WHERE false"


def _unnested(images: str) -> str:
    nested = {field.name for field in tables.IMAGES.field("classes").type.value_type}
    columns = [f"class.{name}" if name in nested else name for name in tables.CLASSES.names]
    rows = f"SELECT uri, run_id, unnest(classes) AS class FROM ({images})"
    return f"SELECT {', '.join(columns)} FROM ({rows})"


# masks are wide: which rows are the newest is decided on narrow columns alone
def _latest(unfinished: Mapping[str, datetime | None]) -> str:
    starts = ["SELECT run_id, started_at FROM runs"]
    for run_id, started in unfinished.items():
        at = _quoted(started.isoformat()) if started else "NULL"
        starts.append(f"SELECT {_quoted(run_id)}, {at}::TIMESTAMPTZ")
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


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _escaped(uri: str) -> str:
    """The local path as a DuckDB pattern that it alone matches; remote names are no patterns."""
    if uri.startswith("/"):
        return re.sub(r"[\[*?]", r"[\g<0>]", uri)
    return uri


class _Listed(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """The files of one listing, read through `remote`, each name meaning itself.

    DuckDB asks for size and date of each file several times a query; by itself the remote
    filesystem would send a request each time (7 a file), and would take names for patterns.
    """

    cachable = False

    def __init__(self, remote: Any, files: Iterable[storage.Object]) -> None:
        super().__init__()
        self.protocol = remote.protocol
        self._remote = remote
        self._sizes = {item.uri: item.size for item in files}

    def glob(self, path: str, **_: object) -> list[str]:
        return [path] if path in self._sizes else []

    def info(self, path: str, **_: object) -> dict[str, object]:
        if path not in self._sizes:
            raise FileNotFoundError(path)
        return {"name": path, "size": self._sizes[path], "type": "file"}

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)  # never: a result's file is written once

    def open(self, path: str, mode: str = "rb", **_: object) -> Any:
        found = self.info(path)
        file = self._remote.open(path, mode, block_size=_READ_AHEAD_BYTES, size=found["size"])
        file.details = found  # or it would ask
        return file
