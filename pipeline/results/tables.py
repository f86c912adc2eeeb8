"""The tables that a run writes: Arrow schemas, footer keys, and Parquet encoding.

Files are built in memory and written whole, always with the explicit schema: a column of nulls must
not get type null. Readers use `hive_partitioning=false`, because `run_id` is a column.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.labels import Classes

SCHEMA_VERSION = 1

PERMANENT_ERRORS = frozenset(
    {"empty", "truncated", "not_an_image", "too_large", "unsupported", "corrupt"}
)
"""Error kinds that the same bytes always give; images with any other error are retried."""

_string, _int16, _int32, _int64 = pa.string(), pa.int16(), pa.int32(), pa.int64()
_float32, _name = pa.float32(), pa.dictionary(pa.int32(), pa.string())

_CLASS_FIELDS = [
    pa.field("class_id", _int16),
    pa.field("class_name", _string),
    pa.field("pixels", _int64),  # of the mask
    pa.field("fraction", _float32),  # of the image's pixels, 0 to 1
    pa.field("confidence", _float32),  # mean winning probability over those pixels
    pa.field("tp", _int64),  # pixels; null without a label
    pa.field("fp", _int64),
    pa.field("fn", _int64),
    pa.field("iou", _float32),  # null without a label, or where tp + fp + fn is 0
]

IMAGES = pa.schema(
    [
        pa.field("uri", _string, nullable=False),
        pa.field("etag", _string, nullable=False),
        pa.field("bytes", _int64, nullable=False),
        pa.field("run_id", _string, nullable=False),
        pa.field("shard", _int32, nullable=False),
        pa.field("model", _string, nullable=False),
        pa.field("settings", _string, nullable=False),
        pa.field("status", _string, nullable=False),  # ok, error
        pa.field("error_kind", _string),
        pa.field("error", _string),
        pa.field("height", _int32),  # px, after orientation
        pa.field("width", _int32),
        pa.field("mask", pa.binary()),  # 8-bit L PNG, value = class id
        pa.field("confidence", _float32),  # mean winning probability
        pa.field("label_uri", _string),
        pa.field("label_etag", _string),
        pa.field("label_error", _string),
        pa.field("classes", pa.list_(pa.struct(_CLASS_FIELDS))),
        # added later: missing, which means 0, in files of earlier versions
        pa.field("format_version", _int16),  # of the image's family, see data/image_formats.py
    ]
)

IMAGES_COMMON = pa.schema([field for field in IMAGES if field.name != "format_version"])
"""Columns that files of every version have: the columns of the views. Showing more would require
reading every footer before the first row."""

CLASSES = pa.schema(
    [pa.field("uri", _string, nullable=False), pa.field("run_id", _string, nullable=False)]
    + [field.with_type(_name) if field.name == "class_name" else field for field in _CLASS_FIELDS]
)

DONE = pa.schema(
    [
        pa.field("uri", _string, nullable=False),
        pa.field("etag", _string, nullable=False),
        pa.field("model", _string, nullable=False),
        pa.field("settings", _string, nullable=False),
        pa.field("label_etag", _string),
        pa.field("status", _string, nullable=False),
        pa.field("error_kind", _string),
        pa.field("run_id", _string, nullable=False),
        pa.field("format_version", _int16),  # added later, as in IMAGES
    ]
)

RUNS = pa.schema(
    [
        pa.field("run_id", _string, nullable=False),
        pa.field("started_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("finished_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("arguments", _string, nullable=False),  # JSON, as given
        pa.field("checkpoint", _string, nullable=False),
        pa.field("checkpoint_sha256", _string, nullable=False),
        pa.field("model", _string, nullable=False),
        pa.field("settings", _string, nullable=False),
        pa.field("code_version", _string, nullable=False),
        pa.field("images", _int64, nullable=False),
        pa.field("ok", _int64, nullable=False),
        pa.field("errors", _int64, nullable=False),
        pa.field("label_errors", _int64, nullable=False),
        pa.field("shards", _int64, nullable=False),
        pa.field("bytes_read", _int64, nullable=False),  # by all drivers of the run
        pa.field("seconds", pa.float64(), nullable=False),  # of the driver that finished the run
        pa.field("images_per_second", pa.float64()),  # of that driver; null if it processed none
        pa.field(
            "errors_by_kind",
            pa.list_(pa.struct([pa.field("kind", _string), pa.field("images", _int64)])),
        ),
        pa.field("mean_iou", pa.float64()),
        pa.field(
            "class_iou",
            pa.list_(
                pa.struct(
                    [
                        pa.field("class_id", _int16),
                        pa.field("class_name", _string),
                        pa.field("tp", _int64),
                        pa.field("fp", _int64),
                        pa.field("fn", _int64),
                        pa.field("iou", pa.float64()),
                    ]
                )
            ),
        ),
        # added later: null in records of earlier versions
        pa.field("bytes_written", _int64),  # images, classes and done
        pa.field("actor_seconds", pa.float64()),  # each from its start to the end of its last shard
        pa.field("gpu_seconds", pa.float64()),  # actor_seconds times the GPUs per actor
        pa.field("price_per_gpu_hour", pa.float64()),  # --price-per-gpu-hour
        pa.field("cost", pa.float64()),  # null without a price
        pa.field("inventory", _string),  # read instead of a listing
        pa.field("inventory_etag", _string),
        pa.field("wait_seconds", pa.float64()),  # part of actor_seconds: waiting for images
        pa.field("infer_seconds", pa.float64()),  # part of actor_seconds: running the network
    ]
)


def with_footer(schema: pa.Schema, classes: Classes) -> pa.Schema:
    """Return the schema with footer keys: class names, palette, ignore_index, schema version."""
    values = classes.to_dict()
    return schema.with_metadata(
        {
            "class_names": json.dumps(values["names"]),
            "palette": json.dumps(values["palette"]),
            "ignore_index": str(classes.ignore_index),
            "schema_version": str(SCHEMA_VERSION),
        }
    )


def classes_from_footer(metadata: Mapping[bytes, bytes]) -> Classes:
    """Return the classes in a file's footer keys. Raises ValueError if they are missing."""
    if b"class_names" not in metadata:
        raise ValueError("the file's footer has no class names; was it written by this pipeline?")
    return Classes.from_dict(
        {
            "names": json.loads(metadata[b"class_names"]),
            "palette": json.loads(metadata[b"palette"]),
            "ignore_index": int(metadata[b"ignore_index"]),
        }
    )


def add_missing_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with all columns of `schema`; those it lacks are null."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema.names).cast(schema)


def rows_to_parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """Return the rows as the bytes of one Parquet file."""
    return table_to_parquet(pa.Table.from_pylist(list(rows), schema=schema))


def table_to_parquet(table: pa.Table) -> bytes:
    """Return the table as the bytes of one Parquet file; masks, already PNG, are not compressed."""
    compression = {
        name: "none" if name == "mask" else "zstd" for name in _leaf_columns(table.schema)
    }
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=compression)
    return buffer.getvalue()


def _leaf_columns(schema: pa.Schema) -> list[str]:
    """Return the dotted paths of all Parquet leaf columns."""
    with io.BytesIO() as empty:
        pq.write_table(schema.empty_table(), empty)
        leaves = pq.ParquetFile(empty).schema
        return [leaves.column(i).path for i in range(len(leaves))]
