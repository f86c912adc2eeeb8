"""Throughput of the bulk job through Ray, and of its segmenter in a plain loop."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass

from pipeline.bulk.driver.preflight import build_pool, build_worker_context
from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.driver.run import run
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.plan import Plan
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker import shard_worker
from pipeline.bulk.worker.segmenter import Segmenter
from pipeline.results.layout import RunLayout

_SHARD_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Rates between the first and the last finished shard, and the time before the first."""

    images: int
    ray_images_per_second: float
    ray_start_s: float
    loop_images_per_second: float
    loop_start_s: float

    @property
    def ratio(self) -> float:
        """The rate through Ray divided by that of the loop."""
        return self.ray_images_per_second / self.loop_images_per_second


class _Clock:
    """A record of how many images were done at which time."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._done: list[tuple[float, int]] = []

    def note(self, images: int) -> None:
        if images and (not self._done or images > self._done[-1][1]):
            self._done.append((time.perf_counter(), images))

    def result(self) -> tuple[float, float]:
        """Return images per second after the first record, and the seconds until it."""
        (since, before), (until, now) = self._done[0], self._done[-1]
        if now == before:
            raise ValueError("--bulk-limit: the images fit into one shard; give more")
        return (now - before) / (until - since), since - self._started


def measure_throughput(images: str, checkpoint: str, *, limit: int, gpu: bool) -> Throughput:
    """Segment the first `limit` images below `images` both ways, on one actor and one CPU.

    Raises what `run` raises, and ValueError if the images fit into one shard.
    """
    with tempfile.TemporaryDirectory() as results:
        settings = BulkSettings(
            images=images,
            results=results,
            checkpoint=checkpoint,
            limit=limit,
            run_id="benchmark",
            shard_images=_SHARD_IMAGES,
            actors=(1, 1),
            cpus_per_actor=1,
            gpus_per_actor=1.0 if gpu else 0.0,
        )
        ray, loop = _Clock(), _Clock()

        def watch(_: Plan, progress: Progress) -> None:
            ray.note(progress.images_now)

        ended = run(settings, watch)
        loop = _loop(settings, ended.plan)
    (ray_rate, ray_start), (loop_rate, loop_start) = ray.result(), loop.result()
    return Throughput(
        images=ended.plan.counts.images,
        ray_images_per_second=ray_rate,
        ray_start_s=ray_start,
        loop_images_per_second=loop_rate,
        loop_start_s=loop_start,
    )


def _loop(settings: BulkSettings, planned: Plan) -> _Clock:
    layout = RunLayout(results=settings.results, run_id=planned.run_id)
    work = build_worker_context(settings, layout, planned, build_pool(settings))
    clock, done = _Clock(), 0
    with closing(Segmenter(work)) as segmenter:
        for part in planned.parts:
            for row in plan.read_part(layout, part).to_pylist():
                images = shard_worker.images_of(row["images"])
                segmenter.rows_of(row["shard"], images)
                done += len(images)
                clock.note(done)
    return clock
