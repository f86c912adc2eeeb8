"""What a run came to, for people: numbers by class, errors by kind, and photos to look at.

Enters: a results URI and a run, finished or not. Leaves: a `Report`, plain values that `page`
draws. Memory is that of DuckDB's limit, beyond which its queries spill, and of a shard and a photo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from pipeline.data import storage
from pipeline.data.labels import Classes, Color
from pipeline.results import files, query, tables
from pipeline.results.gallery import GalleryGroup, select_groups
from pipeline.results.layout import RunLayout, shard_number

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
class ErrorSummary:
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
    problems: tuple[ErrorSummary, ...]
    groups: tuple[GalleryGroup, ...]


@files.interruptible()
def build_report(results: str, run_id: str, *, images: int) -> Report:
    """The report of a run, with up to `photos` photos of each group.

    Raises LookupError where the run has no photos, ValueError where `results` or `run_id` is
    none, StorageError where storage refuses; a photo that cannot be read any more is shown as such.
    """
    results = storage.normalize(results)
    run = RunLayout(results=results, run_id=run_id)
    con = query.connect(results, run_id=run_id, memory_limit=_MEMORY)
    try:
        record = _record(con)
        classes = _described(con, run, record)
        ok, errors, labelled = _one(
            con,
            """SELECT count(*) FILTER (status = 'ok'), count(*) FILTER (status != 'ok'),
                      count(*) FILTER (label_uri IS NOT NULL AND label_error IS NULL
                                       AND status = 'ok') FROM images""",
        )
        rows = _classes(con, classes.palette)
        known = [row.iou for row in rows if row.iou is not None]
        return Report(
            results=results,
            run_id=run_id,
            record=record,
            ok=ok,
            errors=errors,
            labelled=labelled,
            classes=rows,
            mean_iou=sum(known) / len(known) if known else None,
            confidence=_histogram(con),
            problems=_problems(con),
            groups=select_groups(con, run, classes, images),
        )
    finally:
        con.close()


def newest_run(results: str) -> str:
    """The id of the finished run with photos that started last; no images are listed for that.

    Raises LookupError where there is none, StorageError where storage refuses.
    """
    results = storage.normalize(results)
    finished = query.run_records(results)
    con = files.connect(results, finished)
    try:
        rows = files.select_statement(con, tables.RUNS, finished, grown=True)
        found = con.execute(
            f"SELECT run_id FROM ({rows}) WHERE images > 0 ORDER BY started_at DESC LIMIT 1"
        ).fetchone()
    finally:
        con.close()
    if found is None:
        raise LookupError(f"no run with photos has finished at {results}; --run-id shows any other")
    run_id: str = found[0]
    return run_id


def _described(
    con: duckdb.DuckDBPyConnection, run: RunLayout, record: Mapping[str, Any] | None
) -> Classes:
    """The classes that the run's files name. Raises LookupError where it has no photos."""
    listed = (item.uri for item in storage.list_objects(run.images))
    uri = next((uri for uri in listed if shard_number(uri) is not None), None)
    if uri is None:
        why = "it found nothing new" if record else "nothing is done, or there is no such run"
        raise LookupError(f"run {run.run_id} has no photos at {run.results}: {why}")
    found = con.execute("SELECT key, value FROM parquet_kv_metadata(?)", [files.escape_glob(uri)])
    return tables.classes_from_footer(dict(found.fetchall()))


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


def _problems(con: duckdb.DuckDBPyConnection) -> tuple[ErrorSummary, ...]:
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
        ErrorSummary(
            kind=kind,
            images=images,
            examples=tuple((each["uri"], each["error"]) for each in examples),
        )
        for kind, images, examples in found
    )
