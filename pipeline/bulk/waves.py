"""Shards stream through one stage of actors: Ray Data, a wave at a time.

One row is one shard, and one row a block, so that nothing can split or merge shards; a row's
result is a small summary. What is expected to go wrong is in the summary; a process that dies
takes its shards with it (they are missing afterwards, and the caller runs them again), and
everything else is a bug that ends the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util.annotations import RayDeprecationWarning

from pipeline.bulk import witness
from pipeline.bulk.listing import Listed
from pipeline.bulk.progress import Summary
from pipeline.bulk.segmenter import CutOffError, Segmenter, SystemicError, Work
from pipeline.data.storage import StorageError
from pipeline.runs import cluster
from pipeline.runs.cluster import RunStoppedError
from pipeline.runs.patience import Patience

_CONCURRENT_SHARDS = 2  # one is fetched and decoded while the other is in the network
_SHARDS_IN_FLIGHT = 3  # and one more waits at the actor
_BUSY = 1.0
"""Shards in flight over those that the pool can work on, from which it grows; they are at most
_SHARDS_IN_FLIGHT / _CONCURRENT_SHARDS, or 1 one at a time: at Ray's own 1.75 it would never."""
_TELL_EVERY_S = 2.0
_LOOK_EVERY_S = 1.0
_BOARD_TIMEOUT_S = 5.0
_INIT_DEATHS = 3
"""Actors in a row that die while they start and are replaced: a node may go just then."""

_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)
"""What Ray says of shards that died with a process or a node."""

logger = logging.getLogger(__name__)


class WaveLostError(RuntimeError):
    """The rest of the wave was not tried: too many processes died, or one is cut off."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How many actors there are, and what each of them takes."""

    min_actors: int
    max_actors: int
    cpus: int
    gpus: float
    max_wait_s: float = 3600.0
    max_stall_s: float = 1800.0

    def connect(self) -> None:
        """Joins or starts a Ray that is large enough. Raises RunStoppedError."""
        cluster.connect(workers=self.max_actors, cpus=self.cpus, gpus=self.gpus)

    def patience(self, stuck: Callable[[], str] = str) -> Patience:
        """How long one waits for such actors."""
        return Patience(
            cpus=self.cpus,
            gpus=self.gpus,
            max_wait_s=self.max_wait_s,
            max_stall_s=self.max_stall_s,
            stuck=stuck,
        )


def photos_of(images: list[dict[str, Any]]) -> list[Listed]:
    """The photos in a plan row's list."""
    return [Listed(**image) for image in images]


class Board:
    """An actor that knows how many photos of each shard are through, for who watches the run."""

    def __init__(self) -> None:
        self._through: dict[int, int] = {}
        self._told = 0

    def tell(self, shard: int, photos: int) -> None:
        self._through[shard] = photos
        self._told += 1

    def forget(self, shard: int) -> None:
        self._through.pop(shard, None)

    def told(self) -> int:
        """A number that changes whenever a shard begins or gets on."""
        return self._told

    def shards(self) -> list[int]:
        """Those that began and are not forgotten."""
        return sorted(self._through)

    def photos(self) -> int:
        """Photos of shards that are not forgotten."""
        return sum(self._through.values())


def start_board() -> Any:
    """The handle of a board; it is started again where its node goes, and knows nothing then."""
    return ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()


class _Teller:
    """Tells the board about one shard, not too often."""

    def __init__(self, board: Any, shard: int) -> None:
        self._board = board
        self._shard = shard
        self._next = time.monotonic() + _TELL_EVERY_S

    def __call__(self, photos: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _TELL_EVERY_S
            self._board.tell.remote(self._shard, photos)


class Stage:
    """The actor: a segmenter, and its words to the driver. No exception leaves it."""

    def __init__(self, work: Work, board: Any) -> None:
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
        return pa.Table.from_pylist([self._segment(row["shard"], photos_of(row["images"]))])

    def _segment(self, shard: int, photos: list[Listed]) -> dict[str, Any]:
        summary, fatal, cut_off = Summary(shard=shard), self._fatal, self._cut_off
        if fatal is None:
            self._board.tell.remote(shard, 0)
            try:
                summary = self._segmenter.segment(shard, photos, _Teller(self._board, shard))
            except (SystemicError, StorageError) as error:
                fatal, cut_off = str(error), isinstance(error, CutOffError | StorageError)
            except Exception as error:  # a bug: said to the driver, which ends the run
                fatal = f"a bug, {type(error).__name__}: {error}\n{traceback.format_exc()}"
        summary.actor, summary.actor_s = self._name, time.monotonic() - self._began
        packed = asdict(replace(summary, errors=Counter()))
        said = {"fatal": fatal or "", "cut_off": cut_off}
        return {**packed, "errors": json.dumps(summary.errors), **said}


def run(
    work: Work,
    shards: pa.Table,
    pool: Pool,
    board: Any,
    *,
    one_at_a_time: bool = False,
) -> Generator[Summary, None, None]:
    """Sends the shards through the pool; the summaries of those that come back, as they come.

    `board` is the handle of a `Board`. With `one_at_a_time` nothing is queued on an actor behind
    another shard, so that a death costs no other shard.
    Raises WaveLostError, and RunStoppedError for what no other wave would do better.
    """
    _set_context(len(shards))
    rows = shards.to_pylist()
    in_flight = 1 if one_at_a_time else _SHARDS_IN_FLIGHT
    # max_restarts and max_task_retries have no other place yet
    warnings.simplefilter("ignore", RayDeprecationWarning)
    watchdog = _Watchdog(pool, board)
    # a block a row, made here: from_arrow would ask the cluster's CPUs about each of them
    summaries = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Stage,
        fn_constructor_args=(work, board),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=min(pool.min_actors, len(rows)),
            max_size=min(pool.max_actors, len(rows)),
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
            if fatal and cut_off and witness.refusal_here(work.layout, work.images) is None:
                raise WaveLostError(f"a node is cut off from storage: {fatal}")
            if fatal:
                raise RunStoppedError(fatal)
            board.forget.remote(row["shard"])
            yield Summary(**{**row, "errors": Counter(json.loads(row["errors"]))})
    except _LOST as error:
        lost = str(error).splitlines()[0]
        _let_go(error)
    except ray.exceptions.RayError as error:
        raise RunStoppedError(f"Ray gave up: {str(error).splitlines()[0]}") from error
    else:
        return
    raise WaveLostError(lost)


def _let_go(error: BaseException | None) -> None:
    """Clears what the error's frames hold: the wave's actors, which else keep their CPUs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _Watchdog:
    """Looks whether a wave gets on, between the steps of its execution."""

    _ours: _Watchdog | None = None  # whose wave begins

    def __init__(self, pool: Pool, board: Any) -> None:
        self._board = board
        self._patience = pool.patience(self._shards_in_work)
        self._next = 0.0
        self._asked: Any = None
        self._told = self._done = 0

    def watched(self, summaries: Any) -> Iterator[dict[str, Any]]:
        """The data set's rows; raises RunStoppedError where none comes for too long."""
        _Watchdog._ours = self
        for row in summaries.iter_rows():
            self._done += 1
            yield row

    def look(self, executor: Any) -> None:
        """Is called by Ray Data's own loop, many times a second; what it raises ends the wave."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOOK_EVERY_S
            self._ask_board()
            self._patience.look(_running_actors(executor), self._told + self._done)

    def _ask_board(self) -> None:
        """Takes the board's answer to the last question, and asks again; waits for nothing."""
        if self._asked is not None and not ray.wait([self._asked], timeout=0)[0]:
            return
        with contextlib.suppress(ray.exceptions.RayError):  # it died, and is started again
            if self._asked is not None:
                self._told = ray.get(self._asked)
        self._asked = self._board.told.remote()

    def _shards_in_work(self) -> str:
        with contextlib.suppress(ray.exceptions.RayError):
            shards = ray.get(self._board.shards.remote(), timeout=_BOARD_TIMEOUT_S)
            return f"; in work: shard {', '.join(map(str, shards[:10]))}" if shards else ""
        return ""


class WatchCallback(ExecutionCallback):
    """What Ray Data makes and calls for each wave; it travels to the actors by name alone."""

    def __init__(self) -> None:
        self._watchdog, _Watchdog._ours = _Watchdog._ours, None

    def on_execution_step(self, executor: Any) -> None:
        if self._watchdog is not None:
            self._watchdog.look(executor)


def _running_actors(executor: Any) -> int:
    """Actors of the wave that are ready; those that wait for a node or load are not."""
    operators = (each for each in executor._topology if hasattr(each, "get_actor_info"))
    return sum(each.get_actor_info().running for each in operators)


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
