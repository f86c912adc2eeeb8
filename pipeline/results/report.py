"""What a run came to, for people: numbers by class, errors by kind, and photos to look at.

Enters: a results URI and a run, finished or not. Leaves: a `Report`, plain values that `page`
draws. Memory is that of a few hundred rows and of the photos shown, whatever the run's size:
beyond DuckDB's limit its queries spill.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow.parquet as pq

from pipeline.data import storage
from pipeline.data.labels import Color
from pipeline.results import files, tables
from pipeline.results.gallery import Group, groups
from pipeline.results.layout import RunLayout
from pipeline.results.query import connect

BINS = 20
"""Of the histogram of confidence, from 0 to 1."""

_MEMORY = "2GB"
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """A class over all photos of the run. `share` is of all pixels, `iou` over those with a label.

    `confidence` is the mean winning probability over its pixels; None where it has none.
    """

    name: str
    color: Color
    images: int
    share: float
    confidence: float | None
    iou: float | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A kind of error: of how many photos, and the URI and reason of a few."""

    kind: str
    images: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run as people look at it. `record` is its row of `runs`, None while it is unfinished."""

    results: str
    run_id: str
    record: Mapping[str, Any] | None
    ok: int
    errors: int
    labelled: int
    classes: tuple[ClassRow, ...]
    mean_iou: float | None
    confidence: tuple[int, ...]  # photos in each of BINS
    problems: tuple[Problem, ...]
    groups: tuple[Group, ...]


def of_run(results: str, run_id: str, *, photos: int) -> Report:
    """The report of a run, with up to `photos` photos of each group.

    Raises LookupError where the run has no results, ValueError where `results` or `run_id` is
    none, StorageError where storage refuses; a photo that cannot be read any more is shown as such.
    """
    results = storage.normalise(results)
    run = RunLayout(results=results, run_id=run_id)
    first = next(storage.list_objects(run.images), None)
    if first is None:
        raise LookupError(f"no photo of a run {run_id} lies at {results}")
    schema = pq.read_schema(io.BytesIO(storage.read(first.uri)))
    classes = tables.classes_of(schema.metadata or {})
    con = connect(results, run_id=run_id, memory_limit=_MEMORY)
    try:
        rows = _classes(con, classes.palette)
        known = [row.iou for row in rows if row.iou is not None]
        ok, errors, labelled = _one(
            con,
            """SELECT count(*) FILTER (status = 'ok'), count(*) FILTER (status != 'ok'),
                      count(*) FILTER (label_uri IS NOT NULL AND label_error IS NULL
                                       AND status = 'ok') FROM images""",
        )
        return Report(
            results=results,
            run_id=run_id,
            record=_record(con),
            ok=ok,
            errors=errors,
            labelled=labelled,
            classes=rows,
            mean_iou=sum(known) / len(known) if known else None,
            confidence=_histogram(con),
            problems=_problems(con),
            groups=groups(con, run, classes, photos),
        )
    finally:
        con.close()


def newest(results: str) -> str:
    """The id of the finished run that started last; no images are listed for that.

    Raises LookupError where no run has finished, StorageError where storage refuses.
    """
    results = storage.normalise(results)
    listed = storage.list_objects(storage.join(results, "runs"))
    records = [item for item in listed if item.uri.endswith(".parquet")]
    con = files.connect(results, records)
    try:
        rows = files.select(con, tables.RUNS, records, grown=True)
        found = con.execute(f"SELECT run_id FROM ({rows}) ORDER BY started_at DESC").fetchone()
    finally:
        con.close()
    if found is None:
        raise LookupError(f"no run at {results} has finished; give --run-id for one that has not")
    run_id: str = found[0]
    return run_id


def _one(con: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """The only row of an answer."""
    found: tuple[Any, ...] | None = con.execute(sql).fetchone()
    assert found is not None
    return found


def _record(con: duckdb.DuckDBPyConnection) -> dict[str, Any] | None:
    found = con.execute("SELECT * FROM runs").fetchone()
    names = [column[0] for column in con.description or ()]
    return dict(zip(names, found, strict=True)) if found else None


def _classes(con: duckdb.DuckDBPyConnection, palette: tuple[Color, ...]) -> tuple[ClassRow, ...]:
    """The classes that masks or labels hold, in the order of their ids."""
    (total,) = _one(con, "SELECT sum(height::BIGINT * width) FROM images WHERE status = 'ok'")
    found = con.execute(
        """SELECT class_id, class_name, count(*) FILTER (pixels > 0), sum(pixels),
                  sum(confidence * pixels) / nullif(sum(pixels), 0), any_value(iou.iou)
           FROM classes LEFT JOIN iou USING (class_id, class_name)
           GROUP BY class_id, class_name ORDER BY class_id"""
    ).fetchall()
    return tuple(
        ClassRow(
            name=name,
            color=palette[class_id],
            images=images,
            share=float(pixels / total),
            confidence=confidence,
            iou=iou,
        )
        for class_id, name, images, pixels, confidence, iou in found
    )


def _histogram(con: duckdb.DuckDBPyConnection) -> tuple[int, ...]:
    """The photos in each of BINS equal parts of confidence from 0 to 1."""
    found = dict(
        con.execute(
            "SELECT least(floor(confidence * $1), $1 - 1)::INT AS bin, count(*) FROM images "
            "WHERE status = 'ok' GROUP BY bin",
            [BINS],
        ).fetchall()
    )
    return tuple(found.get(number, 0) for number in range(BINS))


def _problems(con: duckdb.DuckDBPyConnection) -> tuple[Problem, ...]:
    """The kinds of error, the most frequent first; labels that could not be used are one."""
    found = con.execute(
        f"""WITH errors AS (
                SELECT error_kind AS kind, uri, error FROM images WHERE status != 'ok'
                UNION ALL
                SELECT 'label', label_uri, label_error FROM images WHERE label_error IS NOT NULL
            )
            SELECT kind, count(*) AS images,
                   arg_min({{'uri': uri, 'error': error}}, uri, {_EXAMPLES})
            FROM errors GROUP BY kind ORDER BY images DESC, kind"""
    ).fetchall()
    return tuple(
        Problem(
            kind=kind,
            images=images,
            examples=tuple((each["uri"], each["error"]) for each in examples),
        )
        for kind, images, examples in found
    )
