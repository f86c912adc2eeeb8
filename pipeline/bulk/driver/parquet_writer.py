"""Write a sorted stream of rows as Parquet files whose bytes depend on the rows alone.

DuckDB's batch boundaries depend on its threads, so row groups of `ROW_GROUP` rows are made here; a
file ends with the row group that takes it to `PART_BYTES`. The same rows in the same order give the
same bytes with the same version of Arrow.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

PART_BYTES = 64 * 2**20
"""Size of a file of `classes` or `done` after which the next one is started."""

ROW_GROUP = 100_000
"""Rows per row group; one class of a million images is in few of them."""


def write_row_groups(reader: pa.RecordBatchReader, schema: pa.Schema) -> Iterator[bytes]:
    """Yield Parquet files of at least `PART_BYTES`, the last one smaller; none without rows."""
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
    """Yield the rows in tables of `ROW_GROUP` rows, the last one smaller."""
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
    return pa.Table.from_batches(batches).combine_chunks()  # else pages end at chunk boundaries
