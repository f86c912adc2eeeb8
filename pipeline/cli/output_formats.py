"""Output formats of query results: a table, CSV, JSON, Parquet.

Text from buckets is untrusted: control characters never reach a terminal raw, and spreadsheets do
not read a cell of a CSV as a formula.
"""

from __future__ import annotations

import base64
import datetime
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.sanitize import json_text, visible

_TABLE_ROWS = 1000

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_parquet(reader: pa.RecordBatchReader, file: BinaryIO) -> None:
    schema = pa.schema(
        field.with_name(name)
        for field, name in zip(reader.schema, _distinct(reader.schema.names), strict=True)
    )
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))


def _table(reader: pa.RecordBatchReader, to_terminal: bool) -> Iterator[str]:
    """Yield the first rows as a table, which is only limited in width in a terminal."""
    table = Table()
    for field in reader.schema:
        right = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(Text(visible(field.name)), justify=justify, overflow="fold")
    rows = _rows(reader, lambda data: f"<{len(data)} bytes>")
    for number, row in enumerate(rows):
        if number == _TABLE_ROWS:
            table.caption = f"the first {_TABLE_ROWS} rows; --format csv, json and parquet give all"
            break
        table.add_row(*(Text(visible(_cell(value))) for value in row))
    text = io.StringIO()
    width = None if to_terminal else 10**6
    console = Console(file=text, width=width, color_system=None, legacy_windows=False)
    console.print(table)
    yield text.getvalue()


def _csv(reader: pa.RecordBatchReader, to_terminal: bool) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        joined = ",".join(cells)
        return (visible(joined) if to_terminal else joined) + "\r\n"

    yield line([_csv_cell(name) for name in _distinct(reader.schema.names)])
    for row in _rows(reader, _base64):
        yield line(["" if value is None else _csv_cell(value) for value in row])


def _csv_cell(value: Any) -> str:
    """Return the value as in RFC 4180; an empty string is "", null is an empty cell."""
    text = _cell(value)
    if isinstance(value, str) and not isinstance(value, _Base64) and text.startswith(_FORMULA):
        text = f"'{text}"
    if text == "" or re.search(r'[",\r\n]|^\s|\s$', text):
        return '"' + text.replace('"', '""') + '"'
    return text


def _json(reader: pa.RecordBatchReader, _: bool) -> Iterator[str]:
    names = _distinct(reader.schema.names)
    before = "[\n"
    for row in _rows(reader, _base64):
        yield before + _json_text(dict(zip(names, row, strict=True)))
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def _rows(
    reader: pa.RecordBatchReader, binary: Callable[[bytes], str]
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows as JSON values; `binary` converts bytes."""
    kinds = reader.schema.types
    for batch in reader:
        columns = [
            [_plain(value, kind, binary) for value in column.to_pylist()]
            for column, kind in zip(batch.columns, kinds, strict=True)
        ]
        yield from zip(*columns, strict=True)


def _plain(value: Any, kind: pa.DataType, binary: Callable[[bytes], str]) -> Any:
    """Return a JSON value: floats as short as their type allows, times in ISO 8601."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(str(np.float32(value))) if pa.types.is_float32(kind) else value
        case bytes():
            return binary(value)
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case dict():
            return {name: _plain(value[name], kind.field(name).type, binary) for name in value}
        case list() if pa.types.is_map(kind):
            return {str(key): _plain(item, kind.item_type, binary) for key, item in value}
        case list():
            return [_plain(item, kind.value_type, binary) for item in value]
    return str(value)


class _Base64(str):
    """Encoded bytes: not a formula, whatever they start with."""


def _base64(data: bytes) -> _Base64:
    return _Base64(base64.b64encode(data).decode())


def _cell(value: Any) -> str:
    """Return a plain value as text, nested ones as JSON."""
    if value is None:
        return "NULL"
    return _json_text(value) if isinstance(value, bool | list | dict) else str(value)


def _json_text(value: Any) -> str:
    """Return the plain value as JSON without raw control characters; NaN and inf are null."""
    try:
        return json_text(value, allow_nan=False)
    except ValueError:
        return json_text(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names of the columns; repeated ones get a number."""
    taken: list[str] = []
    for name in names:
        free = (f"{name}_{number}" for number in itertools.count(1))
        taken.append(name if name not in taken else next(f for f in free if f not in taken))
    return taken


WRITERS: dict[str, Callable[[pa.RecordBatchReader, bool], Iterator[str]]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
}
"""Functions that yield a result as text, in parts, given whether it goes to a terminal."""
