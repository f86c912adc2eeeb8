"""Asks a results URI in SQL: `python jobs/query.py RESULTS "SELECT * FROM iou"`."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import duckdb
import pyarrow as pa
import tyro

from pipeline.cli.arguments import parse
from pipeline.cli.exit import discard_output, hard_exit, run_interactive
from pipeline.cli.interruptible import BackgroundCall
from pipeline.cli.output_formats import WRITERS, write_parquet
from pipeline.data import storage
from pipeline.results.query import connect

_BATCH_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Asks the results of bulk runs in SQL (DuckDB's dialect).

    Views: images (one row an image), classes (one row an image and class), runs (one row a
    finished run), latest (of each uri the newest ok row), iou (per run and class).
    """

    results: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RESULTS")]
    """Where the runs wrote: s3://bucket/prefix or a folder."""

    sql: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SQL")]
    """The question, such as "SELECT * FROM iou ORDER BY iou"."""

    format: Literal["table", "csv", "json", "parquet"] = "table"
    """table shows at most 1000 rows and the size of binary values. csv and json hold binary values
    as base64; in csv a string that starts with = + - @ TAB or CR gets a single quote before it, so
    that no spreadsheet takes it for a formula. json is one array of objects."""

    output: Path | None = None
    """A file to write instead of standard output."""

    def __post_init__(self) -> None:
        storage.normalize(self.results)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the answer; 0, or 1 where it failed, or 2 where the arguments are wrong."""
    return run_interactive(
        lambda: _arguments(argv),
        _print_answer,
        expected=(duckdb.Error, OSError, ValueError, pa.ArrowException),
    )


def _arguments(argv: Sequence[str] | None) -> Arguments:
    arguments = parse(Arguments, argv, description=Arguments.__doc__)
    if arguments.format == "parquet" and arguments.output is None and sys.stdout.isatty():
        raise ValueError("parquet is not for a terminal: give --output, or pipe it")
    return arguments


def _print_answer(arguments: Arguments) -> None:
    try:
        with BackgroundCall() as beside:
            _answer(arguments, beside)
    except KeyboardInterrupt:
        discard_output(sys.stdout)
        raise
    except BrokenPipeError:  # who reads has seen enough
        discard_output(sys.stdout)


def _answer(arguments: Arguments, beside: BackgroundCall) -> None:
    con, spilled = beside.wait_for(lambda: _connected(arguments.results))
    try:
        reader = beside.wait_for(lambda: _asked(con, arguments.sql), con.interrupt)
        if reader is not None:
            _write(arguments, _interruptible(con, reader, beside))
    except KeyboardInterrupt:  # the connection may be in use still, and then cannot be closed
        shutil.rmtree(spilled, ignore_errors=True)
        raise
    except Exception:
        con.close()
        raise
    con.close()


def _connected(results: str) -> tuple[duckdb.DuckDBPyConnection, str]:
    """A connection, and the folder to which it spills what does not fit into memory."""
    con = connect(results)
    con.execute("SET python_enable_replacements = false")  # our variables are no tables
    [[spilled]] = con.execute("SELECT current_setting('temp_directory')").fetchall()
    return con, spilled


def _asked(con: duckdb.DuckDBPyConnection, sql: str) -> pa.RecordBatchReader | None:
    result = con.sql(sql)
    return None if result is None else result.to_arrow_reader(_BATCH_ROWS)


def _interruptible(
    con: duckdb.DuckDBPyConnection, reader: pa.RecordBatchReader, beside: BackgroundCall
) -> pa.RecordBatchReader:
    """The reader, each of whose batches can be waited for in vain."""

    def batches() -> Iterator[pa.RecordBatch]:
        while (batch := beside.wait_for(lambda: next(reader, None), con.interrupt)) is not None:
            yield batch

    return pa.RecordBatchReader.from_batches(reader.schema, batches())


def _write(arguments: Arguments, reader: pa.RecordBatchReader) -> None:
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
    """Standard output, or a file that appears under its name when it is whole."""
    if output is None:
        yield sys.stdout.buffer
    elif output.exists() and not output.is_file():  # /dev/stdout, a named pipe
        with output.open("wb") as file:
            try:
                yield file
            except (BrokenPipeError, KeyboardInterrupt):
                discard_output(file)
                raise
    else:
        target = output.resolve()
        temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    hard_exit(main())
