"""Collect the contents of a run's report: statistics per class, errors by kind, and images.

The run may be unfinished. `page` renders the `Report`. DuckDB spills to disk beyond its memory
limit; besides that, one shard and one image are in memory at a time.
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
"""Number of bins of the confidence histogram, from 0 to 1."""

_MEMORY = "2GB"
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """Statistics of a class over all images of the run.

    `images` is the number of images whose mask contains it, `share` its fraction of all pixels,
    `confidence` the mean winning probability over its pixels (None without any), and `iou` over
    the labeled images.
    """

    name: str
    color: Color
    images: int
    share: float
    confidence: float | None
    iou: float | None


@dataclass(frozen=True, kw_only=True)
class ErrorSummary:
    """A kind of error: the number of images, and (URI, message) of a few examples."""

    kind: str
    images: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Contents of the report page. `record` is the run's row of `runs`, None if unfinished."""

    results: str
    run_id: str
    record: Mapping[str, Any] | None
    ok: int
    errors: int
    labeled: int
    classes: tuple[ClassRow, ...]
    mean_iou: float | None
    confidence: tuple[int, ...]  # images in each of BINS
    error_kinds: tuple[ErrorSummary, ...]
    groups: tuple[GalleryGroup, ...]


def build_report(results: str, run_id: str, *, images: int) -> Report:
    """Return the report of a run, with up to `images` images per gallery group.

    Raises LookupError if the run has no images, ValueError if `results` or `run_id` is malformed,
    StorageError if storage refuses. An image that can no longer be read is shown with a note.
    """
    results = storage.normalize(results)
    run = RunLayout(results=results, run_id=run_id)
    con = query.connect(results, run_id=run_id, memory_limit=_MEMORY)
    try:
        record = _record(con)
        classes = _run_classes(con, run, record)
        ok, errors, labeled = _one_row(
            con,
            """SELECT count(*) FILTER (status = 'ok'), count(*) FILTER (status != 'ok'),
                      count(*) FILTER (label_uri IS NOT NULL AND label_error IS NULL
                                       AND status = 'ok') FROM images""",
        )
        rows = _class_rows(con, classes.palette)
        known = [row.iou for row in rows if row.iou is not None]
        return Report(
            results=results,
            run_id=run_id,
            record=record,
            ok=ok,
            errors=errors,
            labeled=labeled,
            classes=rows,
            mean_iou=sum(known) / len(known) if known else None,
            confidence=_histogram(con),
            error_kinds=_error_kinds(con),
            groups=select_groups(con, run, classes, images),
        )
    finally:
        con.close()


def newest_run(results: str) -> str:
    """Return the id of the finished run with images that started last.

    Only records are listed, no images. Raises LookupError if there is no such run, StorageError if
    storage refuses.
    """
    results = storage.normalize(results)
    finished = query.run_records(results)
    con = files.connect(results, finished)
    try:
        rows = files.select_statement(con, tables.RUNS, finished, allow_missing=True)
        found = con.execute(
            f"SELECT run_id FROM ({rows}) WHERE images > 0 ORDER BY started_at DESC LIMIT 1"
        ).fetchone()
    finally:
        con.close()
    if found is None:
        raise LookupError(
            f"no finished run with images at {results}; give --run-id to report an unfinished one"
        )
    run_id: str = found[0]
    return run_id


def _run_classes(
    con: duckdb.DuckDBPyConnection, run: RunLayout, record: Mapping[str, Any] | None
) -> Classes:
    """Return the classes in the footers of the run's files. Raises LookupError without images."""
    listed = (item.uri for item in storage.list_objects(run.images))
    uri = next((uri for uri in listed if shard_number(uri) is not None), None)
    if uri is None:
        why = "it found nothing new" if record else "it has not started, or does not exist"
        raise LookupError(f"run {run.run_id} has no images at {run.results}: {why}")
    found = con.execute("SELECT key, value FROM parquet_kv_metadata(?)", [files.escape_glob(uri)])
    return tables.classes_from_footer(dict(found.fetchall()))


def _one_row(con: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """Return the only row of a result."""
    found: tuple[Any, ...] | None = con.execute(sql).fetchone()
    assert found is not None
    return found


def _record(con: duckdb.DuckDBPyConnection) -> dict[str, Any] | None:
    found = con.execute("SELECT * FROM runs").fetchone()
    names = [column[0] for column in con.description or ()]
    return dict(zip(names, found, strict=True)) if found else None


def _class_rows(con: duckdb.DuckDBPyConnection, palette: tuple[Color, ...]) -> tuple[ClassRow, ...]:
    """Return the classes in any mask or label, in order of their ids."""
    (total,) = _one_row(con, "SELECT sum(height::BIGINT * width) FROM images WHERE status = 'ok'")
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
    """Return the number of images in each of BINS equal bins of confidence from 0 to 1."""
    found = dict(
        con.execute(
            "SELECT least(floor(confidence * $1), $1 - 1)::INT AS bin, count(*) FROM images "
            "WHERE status = 'ok' GROUP BY bin",
            [BINS],
        ).fetchall()
    )
    return tuple(found.get(number, 0) for number in range(BINS))


def _error_kinds(con: duckdb.DuckDBPyConnection) -> tuple[ErrorSummary, ...]:
    """Return the kinds of error, most frequent first; unusable labels are the kind `label`."""
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
