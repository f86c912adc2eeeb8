"""A part of the plan is done until nothing is missing, whatever dies.

Waves first; what came back from no process goes again with nothing queued beside it; and what
then still kills its process goes photo by photo. A wave that is abandoned because too many
processes died, or one is cut off from storage, is begun again as long as each gets shards done;
one that gets none done is followed by waves in which a death costs one shard alone. The results'
listing, not anyone's word, says what is missing.
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
from pipeline.bulk.driver.actor_pool import BatchLostError, Pool, images_of
from pipeline.bulk.driver.isolation import ImageIsolator
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.plan import Part
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.results.layout import RunLayout, shard_number
from pipeline.runs.ray_connection import RunStoppedError

logger = logging.getLogger(__name__)


def shards_done(layout: RunLayout, part: Part) -> set[int]:
    """The numbers of the part's shards whose file exists, by a listing of these alone."""
    names = sorted(layout.shard(number) for number in part.numbers)
    found = storage.list_objects(layout.images, between=(names[0], names[-1]))
    return set(part.numbers).intersection(shard_number(item.uri) for item in found)


class Reconciler:
    """Does parts of one plan; `count` is told of every shard that is done, and may stop it."""

    def __init__(
        self,
        work: WorkerContext,
        pool: Pool,
        rows: RowBuilder,
        count: Callable[[ShardSummary], None],
    ) -> None:
        self._work = work
        self._pool = pool
        self._rows = rows
        self._count = count
        self._board: Any = None

    def photos_in_work(self) -> int:
        """Photos that are through, of shards that are not done."""
        try:
            return 0 if self._board is None else ray.get(self._board.photos.remote(), timeout=1)
        except ray.exceptions.RayError:  # only a display is poorer
            return 0

    def complete(self, part: Part) -> None:
        """Does the part's shards until none is missing. Raises RunStoppedError."""
        if missing := self._missing(part):
            shards = plan.read_part(self._work.layout, part)
            self._pool.connect()
            self._board = self._board or progress_actor.start_progress_actor()
            if self._pool.max_actors > 1 and len(missing) == part.shards and not part.first_shard:
                # one shard by one actor, before the pool grows: what fails at once costs little
                self._wave(shards.slice(0, 1), replace(self._pool, min_actors=1, max_actors=1))
            self._reconcile(part, shards)

    def _reconcile(self, part: Part, shards: pa.Table) -> None:
        for one_at_a_time in (False, True):
            missing = self._missing(part)
            if missing and one_at_a_time:
                logger.warning("%d shards came back from no process; again", len(missing))
            while missing and (lost := self._lost(shards.take(missing), one_at_a_time)):
                before, missing = missing, self._missing(part)
                if len(missing) == len(before):
                    if one_at_a_time:
                        raise RunStoppedError(f"processes get no shard done: {lost}")
                    break  # each death took those along that were in work beside it
                logger.warning("%s; %d shards are missing, again", lost, len(missing))
        if missing := self._missing(part):
            logger.warning("%d shards kill their process; photo by photo now", len(missing))
            self._photo_by_photo(shards.take(missing))

    def _lost(self, shards: pa.Table, one_at_a_time: bool) -> str | None:
        """Why the wave was abandoned, None where it was not.

        Words, not the error: that would hold the wave, and its actors, while the next one runs.
        """
        try:
            self._wave(shards, self._pool, one_at_a_time=one_at_a_time)
        except BatchLostError as error:
            return str(error)
        return None

    def _missing(self, part: Part) -> list[int]:
        """Positions in the part of the shards that have no file."""
        done = shards_done(self._work.layout, part)
        return [i for i, number in enumerate(part.numbers) if number not in done]

    def _wave(self, shards: pa.Table, pool: Pool, *, one_at_a_time: bool = False) -> None:
        summaries = actor_pool.run_batch(
            self._work, shards, pool, self._board, one_at_a_time=one_at_a_time
        )
        # closed at once when something is raised here, so that the actors stop
        with contextlib.closing(summaries):
            for summary in summaries:
                self._count(summary)

    def _photo_by_photo(self, shards: pa.Table) -> None:
        with contextlib.closing(ImageIsolator(self._work, self._pool, self._rows)) as alone:
            for row in shards.to_pylist():
                self._count(alone.segment(row["shard"], images_of(row["images"])))
