"""Runs of random rows that are ready to be finalized, and the expected tables."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk.driver.finalize import RunFinalizer
from pipeline.bulk.planning.plan import Plan, PlanCounts
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.results import tables
from pipeline.results.layout import RunLayout

Rows = list[dict[str, Any]]
FinalizerFor = Callable[[str, Rows], tuple[RunFinalizer, RunLayout]]


def _class(c: int, draw: random.Random, *, labeled: bool) -> dict[str, Any]:
    tp, fp, fn = (draw.choice([0, 0, draw.randrange(1000)]) for _ in range(3))
    scores = {"tp": tp, "fp": fp, "fn": fn, "iou": tp / (tp + fp + fn) if tp + fp + fn else None}
    pixels = draw.choice([0, draw.randrange(1, 10_000)])
    return {
        "class_id": c,
        "class_name": VOC.names[c],
        "pixels": pixels,
        # few values, so that many are equal and the URI decides
        "fraction": draw.choice([0.1, 0.25, 1 / 3, draw.random()]),
        "confidence": draw.random() if pixels else None,
        **(scores if labeled else {}),
    }


def rows_of(count: int, *, labels: str = "some", errors: str = "some", classes: int = 6) -> Rows:
    """Return `count` rows of `images`, ten per shard, not in the order of their URIs.

    "some" or "none" of them have `labels`, and "some", "all" or "none" are `errors`; each image has
    fewer than `classes` classes.
    """
    draw = random.Random(count)
    rows: Rows = []
    for i in range(count):
        row: dict[str, Any] = {"uri": f"s3://b/{i * 7919 % count:05d} é'.jpg", "etag": f"e{i}"}
        row |= {"bytes": i, "run_id": "r", "shard": i // 10, "model": "m", "settings": "s"}
        if errors == "all" or (errors == "some" and i % 7 == 3):
            kind = draw.choice(["truncated", "empty", "timeout"])
            rows.append({**row, "status": "error", "error_kind": kind, "error": "no"})
            continue
        labeled = labels == "some" and i % 3 > 0
        found = draw.sample(range(21), draw.randrange(1, classes))
        row |= {"status": "ok", "height": 5, "width": 7, "mask": b"png", "confidence": 0.5}
        row |= {"label_uri": "l", "label_etag": "x"} if labeled else {}
        row |= {"label_error": "of another size"} if labels == "some" and i % 9 == 0 else {}
        row["classes"] = [_class(c, draw, labeled=labeled) for c in sorted(found)]
        rows.append(row)
    return rows


def make_finalizer(prefix: str, rows: Rows) -> tuple[RunFinalizer, RunLayout]:
    """Write the shards of these rows under the prefix; return the finalizer of their run."""
    layout = RunLayout(results=f"{prefix}/o'results [1]", run_id="r")
    schema = tables.with_footer(tables.IMAGES, VOC)
    for shard in {row["shard"] for row in rows}:
        mine = [row for row in rows if row["shard"] == shard]
        storage.write(layout.shard(shard), tables.rows_to_parquet(mine, schema))
    plan = Plan(
        run_id="r",
        started_at="2026-01-02T03:04:05+00:00",
        fingerprint="f",
        identity={"images": "s3://b", "scales": [1.0]},
        model="m",
        settings="s",
        counts=PlanCounts(images=len(rows), shards=len({row["shard"] for row in rows})),
    )
    return RunFinalizer(layout, plan, VOC), layout


def class_parts(layout: RunLayout) -> list[bytes]:
    """Return the files of `classes`, in order."""
    return [
        storage.read(uri) for uri in sorted(o.uri for o in storage.list_objects(layout.classes))
    ]


def table_of(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


def sorted_classes(rows: Rows) -> list[tuple[Any, ...]]:
    """Return the expected `classes` table, with floats rounded to float32."""
    nested = tables.IMAGES.field("classes").type.value_type
    names = [nested.field(i).name for i in range(nested.num_fields)]
    flat = [
        (row["uri"], "r", *(each.get(name) for name in names))
        for row in rows
        for each in row.get("classes") or []
    ]
    flat = [
        tuple(float(np.float32(value)) if isinstance(value, float) else value for value in row)
        for row in flat
    ]
    return sorted(flat, key=lambda row: (row[2], -row[5], row[0].encode()))


def tuples_of(table: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in table.to_pylist()]
