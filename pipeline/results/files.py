"""Parquet files of a listing as DuckDB reads them: locally or remote, each name meaning itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import duckdb
import fsspec
import pyarrow as pa

from pipeline.data import storage

_OFFLINE = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}

_KEPT_FOOTERS = 2000
"""Files up to which DuckDB keeps their footers between queries: each takes it 55 KB of memory."""

_TOGETHER = 1000
"""Files of one query of `gather`: a query takes about 9 KB a file, and a thread's buffers."""

_READ_AHEAD_BYTES = 2**20
"""Of remote files: neighbouring columns come with one request, skipped row groups do not."""


def connect(
    results: str,
    files: Iterable[storage.Object] = (),
    *,
    memory_limit: str | None = None,
    database: str = ":memory:",
) -> duckdb.DuckDBPyConnection:
    """A DuckDB, in memory or in a local file, that can read these files below `results`.

    It fetches nothing else. Beyond `memory_limit` ("2GB") queries spill to the temporary folder.
    """
    settings: dict[str, str | bool | int | float | list[str]] = {
        **_OFFLINE,
        "temp_directory": os.path.join(tempfile.gettempdir(), f"duckdb-{secrets.token_hex(8)}"),
        **({"memory_limit": memory_limit} if memory_limit else {}),
    }
    con = duckdb.connect(database, config=settings)
    files = list(files)
    keep = str(len(files) <= _KEPT_FOOTERS).lower()
    con.execute(f"SET TimeZone = 'UTC'; SET parquet_metadata_cache = {keep}")
    if files:
        _register(con, results, files)
    return con


def load_table(
    con: duckdb.DuckDBPyConnection,
    table: str,
    schema: pa.Schema,
    results: str,
    files: Iterable[storage.Object],
) -> None:
    """Fills a new table of a connection without files with the schema's columns of all their rows.

    It reads some files at a time, so that memory does not grow with their number.
    Raises StorageError where one cannot be read.
    """
    con.execute("SET parquet_metadata_cache = false")  # footers are read once
    con.execute(f"CREATE TABLE {table} AS {select_statement(con, schema, ())}")
    listed, left = _register(con, results, ()), iter(files)
    while some := list(itertools.islice(left, _TOGETHER)):
        if listed is not None:
            listed.hold(some)
        with storage_errors(results):
            con.execute(f"INSERT INTO {table} {select_statement(con, schema, some)}")


def select_statement(
    con: duckdb.DuckDBPyConnection,
    schema: pa.Schema,
    files: Iterable[storage.Object],
    *,
    grown: bool = False,
) -> str:
    """A SELECT of the schema's columns of all rows of the files, be there any or none.

    With `grown`, files of earlier versions may lack columns, which are null then; all footers are
    read for that.
    """
    listed = ", ".join(quote(escape_glob(item.uri)) for item in files)
    columns = ", ".join(schema.names)
    if listed and not grown:
        return f"SELECT {columns} FROM read_parquet([{listed}], hive_partitioning = false)"
    types = con.from_arrow(schema.empty_table()).types
    nulls = zip(types, schema.names, strict=True)
    none = f"SELECT {', '.join(f'NULL::{kind} AS {name}' for kind, name in nulls)} WHERE false"
    if not listed:
        return none
    rows = f"read_parquet([{listed}], hive_partitioning = false, union_by_name = true)"
    return f"SELECT {columns} FROM ({none} UNION ALL BY NAME FROM {rows})"


@contextlib.contextmanager
def storage_errors(results: str) -> Iterator[None]:
    """What DuckDB says of files that it cannot read is a StorageError, in one line."""
    try:
        yield
    except duckdb.Error as error:
        if _is_interruption(error):
            raise KeyboardInterrupt from None
        raise storage.StorageError(
            "access",
            f"what lies below {results} could not be read: {_gist(error)}; "
            "the same command goes on once it can",
        ) from error


def _is_interruption(error: Exception) -> bool:
    """Whether Ctrl-C came while DuckDB worked, or while it had a remote filesystem read."""
    return _gist(error).startswith(("Query interrupted", "KeyboardInterrupt"))


def _gist(error: Exception) -> str:
    """The error without the query's text, and of one of Python's without the traceback."""
    lines = str(error).partition("\n\nLINE ")[0].strip().splitlines()
    traced = lines and lines[0].startswith("Traceback")
    return (lines[-1] if traced else " ".join(lines)).rstrip(".")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """An interruption that DuckDB turned into an error of its own is one again."""
    try:
        yield
    except (RuntimeError, duckdb.Error) as error:
        if _is_interruption(error):
            raise KeyboardInterrupt from None
        raise


def quote(text: str) -> str:
    """The text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def escape_glob(uri: str) -> str:
    """The local path as a DuckDB pattern that it alone matches; remote names are no patterns."""
    if uri.startswith("/"):
        return re.sub(r"[\[*?]", r"[\g<0>]", uri)
    return uri


def _register(
    con: duckdb.DuckDBPyConnection, results: str, files: Iterable[storage.Object]
) -> _Listed | None:
    """Lets the connection read these files, where they are remote."""
    if (remote := storage.filesystem(results)) is None:
        return None
    listed = _Listed(remote)
    listed.hold(files)
    con.register_filesystem(listed)
    return listed


class _Listed(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """The files of one listing, read through `remote`, each name meaning itself.

    DuckDB asks for size and date of each file several times a query; by itself the remote
    filesystem would send a request each time (7 a file), and would take names for patterns.
    """

    cachable = False

    def __init__(self, remote: Any) -> None:
        super().__init__()
        self.protocol = remote.protocol
        self._remote = remote
        self._sizes: dict[str, int] = {}

    def hold(self, files: Iterable[storage.Object]) -> None:
        """From now on these are its files, and no others."""
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
