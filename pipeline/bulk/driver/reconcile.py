"""Retry the shards of one plan part until all of them are committed, even if workers crash.

First all missing shards run as one batch. Shards that were lost with a process run again, one at a
time per actor; those that then still crash their worker are processed image by image. An abandoned
batch (too many crashes, or a node that cannot reach storage) is retried as long as each attempt
completes some shards. What is missing is known from a listing of the results, not from reports.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from pipeline.bulk.driver import actor_pool, progress_actor
from pipeline.bulk.driver.actor_pool import BatchLostError, Pool
from pipeline.bulk.driver.isolation import ImageIsolator
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.plan import PlanPart
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.bulk.worker.shard_worker import images_of
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.results.layout import RunLayout, shard_number
from pipeline.runs.ray_connection import RunStoppedError

logger = logging.getLogger(__name__)


def shards_done(layout: RunLayout, part: PlanPart) -> set[int]:
    """Return the numbers of the part's shards that have a file, listing only the part's range."""
    names = sorted(layout.shard(number) for number in part.numbers)
    found = storage.list_objects(layout.images, between=(names[0], names[-1]))
    return set(part.numbers).intersection(shard_number(item.uri) for item in found)


class Reconciler:
    """The loop that retries the parts of a plan until they are complete.

    `count` is called with the summary of every shard that is done; what it raises stops the run.
    """

    def __init__(
        self,
        context: WorkerContext,
        pool: Pool,
        rows: RowBuilder,
        count: Callable[[ShardSummary], None],
    ) -> None:
        self._context = context
        self._pool = pool
        self._rows = rows
        self._count = count
        self._progress_actor: Any = None

    def images_in_work(self) -> int:
        """Return the number of images that are done in unfinished shards; 0 if unknown."""
        if self._progress_actor is None:
            return 0
        try:
            images: int = ray.get(self._progress_actor.images.remote(), timeout=1)
        except ray.exceptions.RayError:  # this is for display only
            return 0
        return images

    def complete(self, part: PlanPart) -> None:
        """Process the part's shards until all are committed. Raises RunStoppedError."""
        if missing := self._missing(part):
            shards = plan.read_part(self._context.layout, part)
            self._pool.connect()
            self._progress_actor = self._progress_actor or progress_actor.start_progress_actor()
            if self._pool.max_actors > 1 and len(missing) == part.shards and not part.first_shard:
                # one shard on one actor first: what fails at once is found before the pool grows
                self._run_batch(shards.slice(0, 1), replace(self._pool, min_actors=1, max_actors=1))
            self._reconcile(part, shards)

    def _reconcile(self, part: PlanPart, shards: pa.Table) -> None:
        for one_at_a_time in (False, True):
            missing = self._missing(part)
            if missing and one_at_a_time:
                logger.warning("%d shards were lost with their process; retrying", len(missing))
            while missing and (lost := self._lost(shards.take(missing), one_at_a_time)):
                before, missing = missing, self._missing(part)
                if len(missing) == len(before):
                    if one_at_a_time:
                        raise RunStoppedError(
                            f"workers keep failing without completing any shard: {lost}"
                        )
                    break  # each crash also loses the shards beside it
                logger.warning("%s; retrying the %d shards that are missing", lost, len(missing))
        if missing := self._missing(part):
            logger.warning(
                "%d shards crash their worker; processing them one image at a time", len(missing)
            )
            self._isolate(shards.take(missing))

    def _lost(self, shards: pa.Table, one_at_a_time: bool) -> str | None:
        """Run a batch, and return why it was abandoned, or None.

        A message, not the error: the error would hold the batch and its actors during the next one.
        """
        try:
            self._run_batch(shards, self._pool, one_at_a_time=one_at_a_time)
        except BatchLostError as error:
            return str(error)
        return None

    def _missing(self, part: PlanPart) -> list[int]:
        """Return the positions in the part of the shards that have no file."""
        done = shards_done(self._context.layout, part)
        return [i for i, number in enumerate(part.numbers) if number not in done]

    def _run_batch(self, shards: pa.Table, pool: Pool, *, one_at_a_time: bool = False) -> None:
        summaries = actor_pool.run_batch(
            self._context, shards, pool, self._progress_actor, one_at_a_time=one_at_a_time
        )
        # closed at once when `count` raises, so that the actors stop
        with contextlib.closing(summaries):
            for summary in summaries:
                self._count(summary)

    def _isolate(self, shards: pa.Table) -> None:
        with contextlib.closing(ImageIsolator(self._context, self._pool, self._rows)) as isolator:
            for row in shards.to_pylist():
                self._count(isolator.segment(row["shard"], images_of(row["images"])))
