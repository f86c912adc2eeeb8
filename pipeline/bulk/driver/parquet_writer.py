"""A table in order as Parquet files: cut by its rows alone, however the reader batches them.

DuckDB's batches end where its threads met, so row groups are made here, each of `ROW_GROUP` rows
of the stream; a file ends with the row group that takes it to `PART_BYTES`. The same rows in the
same order so give the same bytes, with one version of Arrow.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

PART_BYTES = 64 * 2**20
"""Bytes of a file of `classes` or `done` from which on the next one is begun."""

ROW_GROUP = 100_000
"""Rows of a row group; a class over a million photos lies in few of them."""


def write_row_groups(reader: pa.RecordBatchReader, schema: pa.Schema) -> Iterator[bytes]:
    """Parquet files of at least `PART_BYTES`, the last one smaller; none without rows."""
    buffer = io.BytesIO()
    writer = None
    for group in _row_groups(reader):
        if writer is None:
            writer = pq.ParquetWriter(buffer, schema, compression="zstd")
        writer.write_table(group.cast(schema))
        if buffer.tell() >= PART_BYTES:
            writer.close()
            yield buffer.getvalue()
            buffer, writer = io.BytesIO(), None
    if writer is not None:
        writer.close()
        yield buffer.getvalue()


def _row_groups(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """The rows in tables of `ROW_GROUP`, the last one smaller."""
    held: list[pa.RecordBatch] = []
    missing = ROW_GROUP
    for batch in reader:
        while len(batch) >= missing:
            yield _joined([*held, batch.slice(0, missing)])
            batch, held, missing = batch.slice(missing), [], ROW_GROUP
        if len(batch):
            held.append(batch)
            missing -= len(batch)
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches).combine_chunks()  # pages would end where chunks do
