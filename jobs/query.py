"""Query results with SQL: `python jobs/query.py RESULTS "SELECT * FROM iou"`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import duckdb
import pyarrow as pa
import tyro

from pipeline.cli.arguments import parse
from pipeline.cli.exit import hard_exit, run_interactive
from pipeline.cli.interrupts import unfinished
from pipeline.cli.output_formats import WRITERS, write_parquet
from pipeline.data import storage
from pipeline.results import files
from pipeline.results.query import connect

_BATCH_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class QueryArguments:
    """Query the results of bulk runs with SQL (DuckDB's dialect).

    Views: images (one row per image and run), classes (one row per image, run and class), runs (one
    row per finished run), latest (the latest successful row of each image), iou (per run and
    class).
    """

    results: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RESULTS")]
    """Results of bulk runs: s3://bucket/prefix or a folder."""

    sql: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SQL")]
    """Query, for example "SELECT * FROM iou ORDER BY iou"."""

    format: Literal["table", "csv", "json", "parquet"] = "table"
    """table prints at most 1000 rows, and the size of binary values. csv and json encode binary
    values as base64; csv puts a single quote before strings that start with = + - @ TAB or CR, so
    that spreadsheets do not read them as formulas. json is one array of objects."""

    output: Path | None = None
    """File to write instead of standard output."""

    def __post_init__(self) -> None:
        storage.normalize(self.results)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the answer and return the exit code: 0, 1 or 2."""
    return run_interactive(
        lambda: _arguments(argv),
        _answer,
        expected=(duckdb.Error, OSError, ValueError, pa.ArrowException),
        on_signal=files.interrupt_queries,
    )


def _arguments(argv: Sequence[str] | None) -> QueryArguments:
    arguments = parse(QueryArguments, argv, description=QueryArguments.__doc__)
    if arguments.format == "parquet" and arguments.output is None and sys.stdout.isatty():
        raise ValueError("parquet cannot be printed to a terminal: give --output, or pipe it")
    return arguments


def _answer(arguments: QueryArguments) -> None:
    with connect(arguments.results) as con:
        con.execute("SET python_enable_replacements = false")  # our variables are not tables
        result = con.sql(arguments.sql)
        if result is None:
            return
        with contextlib.suppress(BrokenPipeError):  # the reader has seen enough
            _write(arguments, result.to_arrow_reader(_BATCH_ROWS))


def _write(arguments: QueryArguments, reader: pa.RecordBatchReader) -> None:
    to_terminal = arguments.output is None and sys.stdout.isatty()
    with _opened(arguments.output) as file:
        if arguments.format == "parquet":
            write_parquet(reader, file)
        else:
            for text in WRITERS[arguments.format](reader, to_terminal):
                file.write(text.encode())
        file.flush()


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    """Open standard output, or a file that gets its name when it is complete."""
    if output is None:
        yield sys.stdout.buffer
    elif output.exists() and not output.is_file():  # /dev/stdout, a named pipe
        with output.open("wb") as file:
            yield file
    else:
        target = output.resolve()
        temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
        unfinished.append(str(temporary))
        try:
            with temporary.open("wb") as file:
                yield file
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    hard_exit(main())
