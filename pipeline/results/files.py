"""Let DuckDB read exactly the Parquet files of a listing, local or remote, by literal names."""

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
from weakref import WeakSet

import duckdb
import fsspec
import pyarrow as pa

from pipeline.data import storage

_OFFLINE = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}

_CACHED_FOOTERS = 2000
"""Number of files up to which DuckDB caches footers between queries, at 55 KB per footer."""

_FILES_PER_QUERY = 1000
"""Files per query of `load_table`: a query needs about 9 KB per file, and buffers per thread."""

_connections: WeakSet[duckdb.DuckDBPyConnection] = WeakSet()

_MISSING_COLUMN_ERRORS = (duckdb.BinderException, duckdb.InvalidInputException)
"""Raised if the first or a later file of a query lacks a column. Only then are all footers read in
advance, which takes twice as long over a network."""

_READ_AHEAD_BYTES = 2**20
"""Of remote files: adjacent columns come with one request, skipped row groups are not read."""


def connect(
    results: str,
    files: Iterable[storage.Object] = (),
    *,
    memory_limit: str | None = None,
    database: str = ":memory:",
) -> duckdb.DuckDBPyConnection:
    """Return a DuckDB, in memory or in a local file, that can read these files under `results`.

    It never installs extensions. Beyond `memory_limit` (such as "2GB") queries spill to the
    temporary folder.
    """
    settings: dict[str, str | bool | int | float | list[str]] = {
        **_OFFLINE,
        "temp_directory": os.path.join(tempfile.gettempdir(), f"duckdb-{secrets.token_hex(8)}"),
        **({"memory_limit": memory_limit} if memory_limit else {}),
    }
    con = duckdb.connect(database, config=settings)
    _connections.add(con)
    files = list(files)
    cached = str(len(files) <= _CACHED_FOOTERS).lower()
    con.execute(f"SET TimeZone = 'UTC'; SET parquet_metadata_cache = {cached}")
    if files:
        _register(con, results, files)
    return con


def interrupt_queries() -> None:
    """Interrupt the running queries of all connections, from a signal handler.

    Otherwise DuckDB finishes its threads' current tasks before it raises, which can take minutes.
    """
    for con in list(_connections):
        with contextlib.suppress(duckdb.Error):  # closed
            con.interrupt()


def load_table(
    con: duckdb.DuckDBPyConnection,
    table: str,
    schema: pa.Schema,
    results: str,
    files: Iterable[storage.Object],
) -> None:
    """Create a table with the schema's columns of all rows of the files.

    `con` is a connection without files. A column is null where a file of an earlier version lacks
    it. Files are read in groups, so memory does not grow with their number. Raises StorageError if
    one cannot be read.
    """
    con.execute("SET parquet_metadata_cache = false")  # each footer is read only once
    con.execute(f"CREATE TABLE {table} AS {select_statement(con, schema, ())}")
    filesystem, remaining = _register(con, results, ()), iter(files)
    while group := list(itertools.islice(remaining, _FILES_PER_QUERY)):
        if filesystem is not None:
            filesystem.set_files(group)
        with storage_errors(results):
            try:
                con.execute(f"INSERT INTO {table} {select_statement(con, schema, group)}")
            except _MISSING_COLUMN_ERRORS:
                complete = select_statement(con, schema, group, allow_missing=True)
                con.execute(f"INSERT INTO {table} {complete}")


def select_statement(
    con: duckdb.DuckDBPyConnection,
    schema: pa.Schema,
    files: Iterable[storage.Object],
    *,
    allow_missing: bool = False,
) -> str:
    """Return a SELECT of the schema's columns from all rows of the files; there may be none.

    With `allow_missing`, columns missing from files of earlier versions are null; this reads all
    footers.
    """
    listed = ", ".join(quote(escape_glob(item.uri)) for item in files)
    columns = ", ".join(schema.names)
    if listed and not allow_missing:
        return f"SELECT {columns} FROM read_parquet([{listed}], hive_partitioning = false)"
    types = con.from_arrow(schema.empty_table()).types
    nulls = zip(types, schema.names, strict=True)
    empty = f"SELECT {', '.join(f'NULL::{kind} AS {name}' for kind, name in nulls)} WHERE false"
    if not listed:
        return empty
    rows = f"read_parquet([{listed}], hive_partitioning = false, union_by_name = true)"
    return f"SELECT {columns} FROM ({empty} UNION ALL BY NAME FROM {rows})"


@contextlib.contextmanager
def storage_errors(results: str) -> Iterator[None]:
    """Turn DuckDB's errors about unreadable files into StorageError with a one-line message."""
    try:
        yield
    except duckdb.Error as error:
        raise storage.StorageError(
            "access",
            f"cannot read results under {results}: {_summary(error)}; "
            "rerun the same command once they are readable",
        ) from error


def _summary(error: Exception) -> str:
    """Return the message without the query's text, or a Python error without its traceback."""
    lines = str(error).partition("\n\nLINE ")[0].strip().splitlines()
    traced = lines and lines[0].startswith("Traceback")
    return (lines[-1] if traced else " ".join(lines)).rstrip(".")


def quote(text: str) -> str:
    """Return the text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def escape_glob(uri: str) -> str:
    """Return a DuckDB glob pattern that matches only this local path; remote URIs are literal."""
    if uri.startswith("/"):
        return re.sub(r"[\[*?]", r"[\g<0>]", uri)
    return uri


def _register(
    con: duckdb.DuckDBPyConnection, results: str, files: Iterable[storage.Object]
) -> _ListedFileSystem | None:
    """Register a filesystem for these files if they are remote, and return it."""
    if (remote := storage.filesystem(results)) is None:
        return None
    filesystem = _ListedFileSystem(remote)
    filesystem.set_files(files)
    con.register_filesystem(filesystem)
    return filesystem


class _ListedFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """The files of one listing, read through `remote`; names are literal, not patterns.

    DuckDB asks for the size and date of a file several times per query. The remote filesystem
    would send a request each time (7 per file); here the listing answers.
    """

    cachable = False

    def __init__(self, remote: Any) -> None:
        super().__init__()
        self.protocol = remote.protocol
        self._remote = remote
        self._sizes: dict[str, int] = {}

    def set_files(self, files: Iterable[storage.Object]) -> None:
        """Replace the files of this filesystem."""
        self._sizes = {item.uri: item.size for item in files}

    def glob(self, path: str, **_: object) -> list[str]:
        return [path] if path in self._sizes else []

    def info(self, path: str, **_: object) -> dict[str, object]:
        if path not in self._sizes:
            raise FileNotFoundError(path)
        return {"name": path, "size": self._sizes[path], "type": "file"}

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)  # constant: files of results are never modified

    def open(self, path: str, mode: str = "rb", **_: object) -> Any:
        found = self.info(path)
        file = self._remote.open(path, mode, block_size=_READ_AHEAD_BYTES, size=found["size"])
        file.details = found  # otherwise it would send a request
        return file
