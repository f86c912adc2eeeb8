"""Small synthetic results of runs, with labels, errors and absent classes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.results import tables
from pipeline.results.layout import RunLayout

FIRST = datetime(2026, 1, 1, 12, tzinfo=UTC)

Row = dict[str, Any]


def rows_of(run_id: str, *, images: int = 6, shard: int = 0, seed: int = 0) -> list[Row]:
    """Return the rows of a shard: image 0 is an error, every third image has no label."""
    rng = np.random.default_rng([seed, shard])
    return [
        image_row(
            f"s3://images/{shard}-{i}.jpg",
            run_id,
            shard=shard,
            status="error" if i == 0 else "ok",
            classes=None if i == 0 else _classes(rng, labeled=i % 3 != 2),
        )
        for i in range(images)
    ]


def image_row(uri: str, run_id: str, **values: Any) -> Row:
    """Return a row of `images`, by default ok and without classes."""
    row: Row = dict.fromkeys(tables.IMAGES.names)
    row |= {"uri": uri, "etag": "e", "bytes": 1, "run_id": run_id, "shard": 0, "model": "m"}
    row |= {"settings": "s", "status": "ok", "classes": [], **values}
    if row["status"] == "ok":
        row |= {"height": 5, "width": 7, "mask": b"\x89PNG\x00", "confidence": 0.3}
    return row


def _classes(rng: np.random.Generator, *, labeled: bool) -> list[Row]:
    found = []
    for class_id in sorted(rng.choice(5, 3, replace=False).tolist()):
        tp, fp, fn = (int(n) if labeled else None for n in rng.integers(0, 2**40, 3))
        if class_id == 4 and labeled:
            tp = fp = fn = 0
        found.append(
            {"class_id": class_id, "class_name": VOC.names[class_id], "pixels": 10}
            | {"fraction": float(rng.random()), "confidence": 0.5}
            | {"tp": tp, "fp": fp, "fn": fn, "iou": None}
        )
    return found


def write_run(
    results: str,
    run_id: str,
    shards: list[list[Row]] | None = None,
    *,
    finished: bool = True,
    hour: int = 0,
    hours: int = 0,
) -> list[Row]:
    """Write a run as the pipeline would, and return its rows.

    It starts `hour` hours after `FIRST` and takes `hours`.
    """
    run = RunLayout(results=results, run_id=run_id)
    shards = shards if shards is not None else [rows_of(run_id), rows_of(run_id, shard=1)]
    started = FIRST + timedelta(hours=hour)
    plan = {"started_at": started.isoformat(), "parts": [{"name": "part-00000-aa.parquet"}]}
    storage.write(f"{run.plan}/plan.json", json.dumps(plan).encode())
    storage.write(f"{run.plan}/part-00000-aa.parquet", b"part")
    for number, rows in enumerate(shards):
        schema = tables.with_footer(tables.IMAGES, VOC)
        storage.write(run.shard(number), tables.rows_to_parquet(rows, schema))
    every = [row for rows in shards for row in rows]
    if finished:
        _finish(run, every, started, started + timedelta(hours=hours))
    return every


def _finish(run: RunLayout, rows: list[Row], started: datetime, finished: datetime) -> None:
    classes = class_rows(rows)
    classes.sort(key=lambda row: (row["class_id"], -row["fraction"]))
    if classes:
        storage.write(run.class_part(0), tables.rows_to_parquet(classes, tables.CLASSES))
    storage.write(run.done, tables.rows_to_parquet([], tables.DONE))
    record: Row = dict.fromkeys(tables.RUNS.names, 0)
    record |= dict.fromkeys(("arguments", "checkpoint", "checkpoint_sha256"), "{}")
    record |= {"run_id": run.run_id, "started_at": started, "finished_at": finished}
    record |= {"model": "m", "settings": "s", "code_version": "0", "images": len(rows)}
    record |= {"errors_by_kind": [], "class_iou": [], "inventory": None, "inventory_etag": None}
    storage.write(run.record, tables.rows_to_parquet([record], tables.RUNS))


def class_rows(rows: list[Row]) -> list[Row]:
    """Return the rows of `classes` that are nested in rows of `images`."""
    return [
        {"uri": row["uri"], "run_id": row["run_id"], **found}
        for row in rows
        for found in row["classes"] or []
    ]
