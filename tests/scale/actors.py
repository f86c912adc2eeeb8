"""Benchmark: throughput by number of actors, and the driver's CPU time per shard.

    python -m tests.scale.actors [ACTORS ...]

The actors are stubs, which sleep for each image and write a small file, so that they do not
compete for CPUs. The plan, Ray Data's stream, reconciliation and progress are the pipeline's own.
Rates are measured from when the last actor is ready until the first one runs out of shards; the
driver's CPU time is that of its whole process, from the first batch of shards to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import ray

from pipeline.bulk.driver import actor_pool, reconcile
from pipeline.bulk.driver.actor_pool import Pool
from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.planning.plan import PlanPart
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.results.layout import RunLayout
from tests.scale.measure import Row, print_table

SECONDS_AN_IMAGE = 0.05
SHARD_IMAGES = 8


class StubStage:
    """A stub of `ShardWorker`: the same summaries, without the network and its libraries."""

    def __init__(self, folder: str, _: Any) -> None:
        self._folder = folder
        self._network = threading.Lock()  # one shard at a time holds it
        self._ready = time.time()

    def __call__(self, batch: pa.Table) -> pa.Table:
        [row] = batch.to_pylist()
        with self._network:
            began = time.time()
            time.sleep(SECONDS_AN_IMAGE * len(row["images"]))
            ended = time.time()
        os.makedirs(self._folder, exist_ok=True)
        with open(f"{self._folder}/shard-{row['shard']:06d}.parquet", "xb") as file:
            file.write(b"rows")
        facts = {"ready": self._ready, "began": began, "ended": ended, "pid": os.getpid()}
        summary = {"shard": row["shard"], "images": len(row["images"]), "committed": True}
        constants = {"errors": "{}", "fatal": "", "cut_off": False}
        return pa.Table.from_pylist([{**summary, **constants, "facts": facts}])


class Measured(ShardSummary):
    """A summary with the measurements of the stub."""

    def __init__(self, *, facts: dict[str, float], **values: Any) -> None:
        super().__init__(**values)
        self.facts = facts


def _plan(settings: BulkSettings, layout: RunLayout, shards: int) -> PlanPart:
    images = (
        ImageRef(f"/images/{i:09d}.jpg", "e" * 32, 1, None, None)
        for i in range(shards * SHARD_IMAGES)
    )
    _, [part] = plan._write_parts(settings, layout, images, write=True)
    return part


def measured(actors: int, shards: int) -> Row:
    """Process a plan of `shards` shards with `actors` actors, and return the measurements."""
    with tempfile.TemporaryDirectory() as folder:
        settings = BulkSettings(
            images=folder, results=folder, checkpoint="/none", shard_images=SHARD_IMAGES
        )
        layout = RunLayout(results=folder, run_id="r")
        part = _plan(settings, layout, shards)
        progress = Progress(images=shards * SHARD_IMAGES, images_before=0)
        found: list[Measured] = []

        def count(summary: Any) -> None:
            progress.add(summary)
            found.append(summary)

        pool = Pool(min_actors=actors, max_actors=actors, cpus=1, gpus=0)
        reconciler = reconcile.Reconciler(_work(layout), pool, Mock(), count)
        cpu = time.process_time()
        reconciler.complete(part)
        cpu = time.process_time() - cpu
        assert len({summary.shard for summary in found}) == shards
    return {
        "actors": actors,
        "shards": shards,
        **_rates(found, actors),
        "driver_ms_a_shard": 1000 * cpu / shards,
    }


def _work(layout: RunLayout) -> Any:
    """Return a stand-in for the worker context; the stub receives only its folder."""
    return _Folder(layout)


class _Folder(str):
    """The folder of the run's `images` files, with the layout as an attribute."""

    layout: RunLayout

    def __new__(cls, layout: RunLayout) -> _Folder:
        made = super().__new__(cls, layout.images)
        made.layout = layout
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


def _rates(found: list[Measured], actors: int) -> Row:
    """Return the images per second while all actors are busy.

    That is from when the last actor is ready until the first one ends, for lack of shards.
    """
    facts = [summary.facts for summary in found]
    batch = [each for each in facts if each["pid"] in _of_last_batch(facts, actors)]
    ready = max(each["ready"] for each in batch)
    last: dict[float, float] = {}
    for each in batch:
        last[each["pid"]] = max(last.get(each["pid"], 0.0), each["ended"])
    end = min(last.values())
    inside = sum(
        max(0.0, min(end, each["ended"]) - max(ready, each["began"]))
        / (each["ended"] - each["began"])
        for each in batch
    )
    return {"images_per_second": inside * SHARD_IMAGES / (end - ready), "window_s": end - ready}


def _of_last_batch(facts: list[dict[str, float]], actors: int) -> set[float]:
    """Return the processes of the last batch; before it, a single actor does the first shard."""
    ready = {each["pid"]: each["ready"] for each in facts}
    return set(sorted(ready, key=ready.__getitem__)[-actors:])


def rows(counts: list[int], shards_each: int) -> Iterator[Row]:
    """Yield a row for each number of actors, all in one Ray session."""
    actor_pool.ShardWorker = StubStage  # type: ignore[misc, assignment, attr-defined]
    actor_pool.ShardSummary = Measured  # type: ignore[misc, assignment, attr-defined]
    actor_pool.ray.cloudpickle.register_pickle_by_value(__import__(__name__))  # type: ignore[attr-defined]
    ray.init(
        address="local", num_cpus=max(counts) + 1, include_dashboard=False, log_to_driver=False
    )
    one = None
    for count in counts:
        row = measured(count, shards_each * count)
        one = one or row["images_per_second"] / count
        yield {**row, "of_linear": row["images_per_second"] / (one * count)}
    ray.shutdown()


def actors_a_driver_feeds(driver_ms_a_shard: float, shard_s: float) -> float:
    """Return how many actors, with shards of `shard_s` seconds, use one core of the driver."""
    return shard_s / (driver_ms_a_shard / 1000)


def main() -> None:
    """Measure, and print a table and the last row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("actors", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, default=40, help="shards per actor")
    given = parser.parse_args()
    found: list[Row] = []

    def kept() -> Iterator[Row]:
        for row in rows(given.actors, given.shards):
            found.append(row)
            yield row

    names = ("actors", "shards", "images_per_second", "of_linear", "window_s", "driver_ms_a_shard")
    print_table(names, kept())
    cost = found[-1]["driver_ms_a_shard"]
    for what, seconds in (("64 images at 0.05 s", 3.2), ("64 images at 1 s", 64.0)):
        feeds = actors_a_driver_feeds(cost, seconds)
        print(f"{cost:.1f} ms per shard: one core of a driver feeds {feeds:.0f} actors of {what}")
    print(json.dumps(found[-1]))


if __name__ == "__main__":
    main()
