"""Shards stream through one stage of actors: Ray Data, a wave at a time.

One row is one shard, and one row a block, so that nothing can split or merge shards; a row's
result is a small summary. What is expected to go wrong is in the summary; a process that dies
takes its shards with it (they are missing afterwards, and the caller runs them again), and
everything else is a bug that ends the run.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning

from pipeline.bulk.driver.progress_actor import ProgressReporter
from pipeline.bulk.driver.watchdog import StallWatchdog, WatchCallback
from pipeline.bulk.planning.listing import Listed
from pipeline.bulk.worker import storage_probe
from pipeline.bulk.worker.failure_streaks import CutOffError, SystemicError
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data.storage import StorageError
from pipeline.runs import ray_connection
from pipeline.runs.ray_connection import RunStoppedError
from pipeline.runs.timeouts import StallTimer
from pipeline.text import first_line

_CONCURRENT_SHARDS = 2  # one is fetched and decoded while the other is in the network
_SHARDS_IN_FLIGHT = 3  # and one more waits at the actor
_BUSY = 1.0
"""Shards in flight over those that the pool can work on, from which it grows; they are at most
_SHARDS_IN_FLIGHT / _CONCURRENT_SHARDS, or 1 one at a time: at Ray's own 1.75 it would never."""
_INIT_DEATHS = 3
"""Actors in a row that die while they start and are replaced: a node may go just then."""

_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # Ray itself killed the process, to save its node
)
"""What Ray says of shards that died with a process or a node."""


class BatchLostError(RuntimeError):
    """The rest of the wave was not tried: too many processes died, or one is cut off."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How many actors there are, and what each of them takes."""

    min_actors: int
    max_actors: int
    cpus: int
    gpus: float
    start_timeout_s: float = 3600.0
    stall_timeout_s: float = 1800.0

    def connect(self) -> None:
        """Joins or starts a Ray that is large enough. Raises RunStoppedError."""
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


def images_of(images: list[dict[str, Any]]) -> list[Listed]:
    """The photos in a plan row's list."""
    return [Listed(**image) for image in images]


class ShardWorker:
    """The actor: a segmenter, and its words to the driver. No exception leaves it."""

    def __init__(self, work: WorkerContext, board: Any) -> None:
        self._board = board
        self._name, self._began = secrets.token_hex(8), time.monotonic()
        self._fatal: str | None = None
        self._cut_off = False
        try:
            self._segmenter = Segmenter(work)
        except (SystemicError, StorageError, ValueError) as error:
            self._fatal = f"the segmenter does not start: {error}"
            self._cut_off = isinstance(error, StorageError)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A batch of one shard -> its summary."""
        [row] = batch.to_pylist()
        return pa.Table.from_pylist([self._segment(row["shard"], images_of(row["images"]))])

    def _segment(self, shard: int, photos: list[Listed]) -> dict[str, Any]:
        summary, fatal, cut_off = ShardSummary(shard=shard), self._fatal, self._cut_off
        if fatal is None:
            self._board.tell.remote(shard, 0)
            try:
                summary = self._segmenter.segment(
                    shard, photos, ProgressReporter(self._board, shard)
                )
            except (SystemicError, StorageError) as error:
                fatal, cut_off = str(error), isinstance(error, CutOffError | StorageError)
            except Exception as error:  # a bug: said to the driver, which ends the run
                fatal = f"a bug, {type(error).__name__}: {error}\n{traceback.format_exc()}"
        summary.actor, summary.actor_s = self._name, time.monotonic() - self._began
        packed = asdict(replace(summary, errors=Counter()))
        said = {"fatal": fatal or "", "cut_off": cut_off}
        return {**packed, "errors": json.dumps(summary.errors), **said}


def run_batch(
    work: WorkerContext,
    shards: pa.Table,
    pool: Pool,
    board: Any,
    *,
    one_at_a_time: bool = False,
) -> Generator[ShardSummary, None, None]:
    """Sends the shards through the pool; the summaries of those that come back, as they come.

    `board` is the handle of a `Board`. With `one_at_a_time` nothing is queued on an actor behind
    another shard, so that a death costs no other shard.
    Raises BatchLostError, and RunStoppedError for what no other wave would do better.
    """
    count = len(shards)
    _set_context(count)
    in_flight = 1 if one_at_a_time else _SHARDS_IN_FLIGHT
    # max_restarts and max_task_retries have no other place yet
    warnings.simplefilter("ignore", RayDeprecationWarning)
    watchdog = StallWatchdog(pool.stall_timer, board)
    # a block a row, made here: from_arrow would ask the cluster's CPUs about each of them
    summaries = ray.data.from_items(shards.to_pylist(), override_num_blocks=count).map_batches(
        ShardWorker,
        fn_constructor_args=(work, board),
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
    try:
        for row in watchdog.watched(summaries):
            fatal, cut_off = row.pop("fatal"), row.pop("cut_off")
            if fatal and cut_off and not _refusal_here(work):
                raise BatchLostError(f"a node is cut off from storage: {fatal}")
            if fatal:
                raise RunStoppedError(fatal)
            board.forget.remote(row["shard"])
            yield ShardSummary(**{**row, "errors": Counter(json.loads(row["errors"]))})
    except _LOST as error:
        lost = first_line(error)
        _let_go(error)
    except ray.exceptions.RayError as error:
        raise RunStoppedError(f"Ray gave up: {first_line(error)}") from error
    else:
        return
    raise BatchLostError(lost)


def _refusal_here(work: WorkerContext) -> StorageError | None:
    return storage_probe.check_access_here(work.layout, work.images, work.labels)


def _let_go(error: BaseException | None) -> None:
    """Clears what the error's frames hold: the wave's actors, which else keep their CPUs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _set_context(shards: int) -> None:
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = -1  # it would end a run that waits for a node
    context.max_consecutive_actor_init_deaths = _INIT_DEATHS
    context.autoscaling_config.actor_pool_util_upscaling_threshold = _BUSY
    context.custom_execution_callback_classes = [WatchCallback]
    context.max_errored_blocks = max(20, shards // 100)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # what ends a wave, or a shard, is said once, by who runs it, and is no fault of Ray's to report
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
