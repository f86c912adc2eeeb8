"""Run a batch of shards through a pool of actors: one Ray data set per batch.

One row is one shard, and a block holds one row, so that nothing splits or merges shards. A row
becomes a small summary. Expected failures are part of the summary. A process that crashes loses
its shards, and the caller retries those that have no file. Everything else is a bug and stops the
run.
"""

from __future__ import annotations

import json
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from pipeline.bulk.driver.watchdog import StallWatchdog, WatchdogCallback
from pipeline.bulk.worker import storage_probe
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.bulk.worker.shard_worker import ShardWorker
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data.storage import StorageError
from pipeline.runs import ray_compat, ray_connection
from pipeline.runs.ray_connection import RunStoppedError
from pipeline.runs.timeouts import StallTimer
from pipeline.text import first_line

_CONCURRENT_SHARDS = 2  # one is fetched and decoded while the other is in the network
_SHARDS_IN_FLIGHT = 3  # and one more is queued at the actor

_UPSCALING_THRESHOLD = 1.0
"""Pool utilization above which Ray Data adds an actor.

Utilization is at most _SHARDS_IN_FLIGHT / _CONCURRENT_SHARDS = 1.5, and 1 with one shard at a time:
with Ray's default of 1.75 the pool would never grow.
"""

_MAX_FAILED_STARTS = 3
"""Actors in a row that may crash while starting; a node may be lost at that moment."""

_MIN_LOST_SHARDS = 20
"""Shards that a batch may lose with their actors before it is abandoned, or 1 % if more."""

_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # Ray killed the process to protect its node
)
"""Ray's errors for shards that were lost with a process or a node."""


class BatchLostError(RuntimeError):
    """A batch was abandoned: too many processes crashed, or one cannot reach storage."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The number of actors, and the resources of each."""

    min_actors: int
    max_actors: int
    cpus: int
    gpus: float
    start_timeout_s: float = 3600.0
    stall_timeout_s: float = 1800.0

    def connect(self) -> None:
        """Connect to a Ray, or start one that is large enough. Raises RunStoppedError."""
        ray_connection.connect(workers=self.max_actors, cpus=self.cpus, gpus=self.gpus)

    def stall_timer(self, details: Callable[[], str] = str) -> StallTimer:
        """Return the timeouts that apply to these actors; `details` describes a stall."""
        return StallTimer(
            cpus=self.cpus,
            gpus=self.gpus,
            start_timeout_s=self.start_timeout_s,
            stall_timeout_s=self.stall_timeout_s,
            details=details,
        )


def unpack(row: dict[str, Any], context: WorkerContext) -> ShardSummary:
    """Return the summary in a row of `pack`.

    Raises RunStoppedError for a fatal error, and BatchLostError if it is that the process could not
    reach storage, and this one can.
    """
    values = dict(row)
    fatal, cut_off = values.pop("fatal"), values.pop("cut_off")
    if fatal and cut_off and not _refusal_here(context):
        raise BatchLostError(f"a node cannot reach storage: {fatal}")
    if fatal:
        raise RunStoppedError(fatal)
    return ShardSummary(**{**values, "errors": Counter(json.loads(values["errors"]))})


def run_batch(
    context: WorkerContext,
    shards: pa.Table,
    pool: Pool,
    progress_actor: Any,
    *,
    one_at_a_time: bool = False,
) -> Generator[ShardSummary, None, None]:
    """Segment a batch of shards, and yield the summaries of those that are done, in any order.

    With `one_at_a_time` no shard is queued at an actor behind another one, so that a crash loses
    one shard only.
    Raises BatchLostError if the batch was abandoned, and RunStoppedError if retrying cannot help.
    """
    watchdog = StallWatchdog(pool.stall_timer, progress_actor)
    with ray_compat.batch_context(
        callback=WatchdogCallback,
        upscaling_threshold=_UPSCALING_THRESHOLD,
        max_failed_starts=_MAX_FAILED_STARTS,
        max_lost_blocks=max(_MIN_LOST_SHARDS, len(shards) // 100),
    ):
        dataset = _dataset(context, shards, pool, progress_actor, 1 if one_at_a_time else None)
        try:
            for row in watchdog.iter_rows(dataset):
                summary = unpack(row, context)
                progress_actor.remove.remote(summary.shard)
                yield summary
        except _LOST as error:
            lost = first_line(error)
            _release_frames(error)
        except ray.exceptions.RayError as error:
            raise RunStoppedError(f"Ray failed: {first_line(error)}") from error
        else:
            return
    raise BatchLostError(lost)


def _dataset(
    context: WorkerContext, shards: pa.Table, pool: Pool, progress_actor: Any, in_flight: int | None
) -> Any:
    """Return the data set of the shards' summaries; nothing is executed yet."""
    count, in_flight = len(shards), in_flight or _SHARDS_IN_FLIGHT
    with warnings.catch_warnings():
        # there is no other way yet to pass max_restarts and max_task_retries
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # a block per row, made here: from_arrow would start a task for each of them
        return ray.data.from_items(shards.to_pylist(), override_num_blocks=count).map_batches(
            ShardWorker,
            fn_constructor_args=(context, progress_actor),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=min(pool.min_actors, count),
                max_size=min(pool.max_actors, count),
                max_tasks_in_flight_per_actor=in_flight,
                max_concurrent_calls_per_actor=min(in_flight, _CONCURRENT_SHARDS),
                enable_true_multi_threading=True,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            max_restarts=-1,
            max_task_retries=0,
        )


def _refusal_here(context: WorkerContext) -> StorageError | None:
    return storage_probe.check_access_here(context.layout, context.images, context.labels)


def _release_frames(error: BaseException | None) -> None:
    """Clear the frames of an error: they hold the batch's actors, which would keep their CPUs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
