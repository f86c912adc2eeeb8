"""Benchmark of finalization: minutes and peak memory for 100 thousand to 10 million images.

    python -m tests.scale.ending [IMAGES ...]

A temporary folder holds the `images` files of a synthetic run: 64 rows per file, each with three
classes and a small mask. The driver's last steps (gather, count, classes, done, record) process
them in a new process; the rows that they write are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.scale.made_up_bucket import IMAGES, made_up
from tests.scale.measure import Row, in_a_process, print_table, taken

SIZES = (100_000, 1_000_000, 10_000_000)
STEPS = ("nothing", "end")
SHARD_IMAGES = 64
CLASSES_EACH = 3
DISTINCT_SHARDS = 15_625
"""Shards of a million images. The others are hard links to these: reading them costs as much."""


def fill(results: str, images: int) -> None:
    """Write the `images` files of the run."""
    from pipeline.data.labels import VOC
    from pipeline.results import tables
    from pipeline.results.layout import RunLayout

    layout = RunLayout(results=results, run_id="made-up")
    Path(layout.images).mkdir(parents=True)
    schema = tables.with_footer(tables.IMAGES, VOC)
    draw = random.Random(images)
    for shard, first in enumerate(range(0, images, SHARD_IMAGES)):
        if shard >= DISTINCT_SHARDS:
            assert first + SHARD_IMAGES <= images, f"{images} images do not fill the last shard"
            os.link(layout.shard(shard % DISTINCT_SHARDS), layout.shard(shard))
            continue
        rows = [
            _row(images, i, shard, draw) for i in range(first, min(images, first + SHARD_IMAGES))
        ]
        with open(layout.shard(shard), "wb") as file:  # no fsync: they are temporary
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")


def _row(images: int, number: int, shard: int, draw: random.Random) -> Row:
    key, etag, size = made_up(IMAGES, images, number)
    row = {"uri": f"s3://{IMAGES}/{key}", "etag": etag, "bytes": size, "run_id": "made-up"}
    row |= {"shard": shard, "model": "m", "settings": "s", "status": "ok", "mask": b"\x89" * 200}
    classes = [_class(class_id, draw) for class_id in draw.sample(range(21), CLASSES_EACH)]
    return {**row, "height": 480, "width": 640, "confidence": 0.9, "classes": classes}


def _class(class_id: int, draw: random.Random) -> Row:
    pixels = draw.randrange(1, 300_000)
    row = {"class_id": class_id, "class_name": f"class {class_id}", "pixels": pixels}
    row |= {"fraction": pixels / 307_200, "confidence": draw.random()}
    return {**row, "tp": pixels // 2, "fp": pixels - pixels // 2, "fn": 7, "iou": 0.5}


def step(name: str, results: str, images: int) -> Row:
    """Run the step in this process, and return its time and peak memory."""
    from pipeline.bulk.driver import run  # noqa: F401 - all that a driver imports
    from pipeline.bulk.driver.finalize import Outcome, RunFinalizer
    from pipeline.bulk.planning.plan import Plan, PlanCounts
    from pipeline.data.labels import VOC
    from pipeline.results.layout import RunLayout

    layout = RunLayout(results=results, run_id="made-up")
    values = {"fingerprint": "f", "identity": {}, "model": "m", "settings": "s"}
    counts = PlanCounts(images=images, shards=-(-images // SHARD_IMAGES))
    started_at = "2026-11-01T12:00:00+00:00"
    plan = Plan(run_id="made-up", started_at=started_at, counts=counts, **values)
    finish = RunFinalizer(layout, plan, VOC)
    nothing = Outcome(images=images, ok=images, errors=0, label_errors=0, errors_by_kind=())
    facts = {"checkpoint": "c", "checkpoint_sha256": "0", "code_version": "1"}
    facts |= {"bytes_read": 0, "seconds": 1.0, "images_per_second": None}

    def end() -> None:
        with finish:
            assert finish.outcome().images == images
            finish.write_classes()
            finish.write_done()
            finish.write_record(nothing, facts)

    return taken(end if name == "end" else lambda: None)


def written(results: str, folder: str) -> tuple[int, int]:
    """Return the numbers of rows and bytes in the Parquet files below the folder."""
    paths = list(Path(results, folder).rglob("*.parquet"))
    return (
        sum(pq.ParquetFile(path).metadata.num_rows for path in paths),
        sum(path.stat().st_size for path in paths),
    )


def all_steps(images: int, steps: Sequence[str] = STEPS) -> Iterator[Row]:
    """Yield a row per step with its time and memory at this number of images."""
    rows = {"classes": CLASSES_EACH * images, "done": images, "runs": 1}
    with tempfile.TemporaryDirectory() as results:
        fill(results, images)
        for name in steps:
            took = in_a_process(
                "tests.scale.ending", "--step", name, "--results", results, str(images)
            )
            row: Row = {"images": images, "step": name, **took}
            if name == "end":
                found = {folder: written(results, folder) for folder in rows}
                assert {folder: count for folder, (count, _) in found.items()} == rows
                row["written_mib"] = sum(size for _, size in found.values()) / 2**20
            yield row


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=int, nargs="*", default=SIZES)
    parser.add_argument("--step", choices=STEPS, help="run only this step, in this process")
    parser.add_argument("--results")
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(step(arguments.step, arguments.results, arguments.images[0])))
        return
    columns = ("images", "step", "minutes", "cpu_minutes", "peak_mib", "disk_mib", "written_mib")
    print_table(columns, (row for images in arguments.images for row in all_steps(images)))


if __name__ == "__main__":
    main()
