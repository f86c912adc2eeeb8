"""A training run from what a person says to its record: look, begin, train on Ray, end.

Whatever stops a run leaves a whole checkpoint behind; the same command goes on from it. The driver
computes nothing: it looks at the data, says what the run is, starts the workers and watches.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.data import storage
from pipeline.runs import cluster, lease
from pipeline.runs.cluster import RunStoppedError
from pipeline.runs.lease import Lease
from pipeline.train import checkpoints, loop
from pipeline.train.begin import Begun, begin, look
from pipeline.train.board import Board, Teller, Watched
from pipeline.train.group import RayGroup
from pipeline.train.settings import Settings
from pipeline.train.task import Task

LOOK_EVERY_S = 2.0

_PATIENCE_S = 24 * 3600
"""Seconds that a worker waits for another one, which may be slow on val; Ray notices the dead."""

Watch = Callable[[Watched], None]
"""Is told how far the run is, every few seconds."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended: its record, and whether it had ended before."""

    record: dict[str, Any]
    nothing_to_do: bool = False


def fit(settings: Settings, say: Callable[[str], None], watch: Watch) -> Ended:
    """Trains what the settings say, or what is left of it.

    Raises ValueError (SampleError and CheckpointError are ones) or StorageError for what the
    settings name and cannot be used, lease.HeldError where another driver works on the run,
    RunStoppedError where it cannot go on.
    """
    looked = look(settings, say)
    record = recorded(settings.out)
    if record is not None:
        return Ended(record=record, nothing_to_do=True)
    cluster.connect(
        workers=settings.most_workers, cpus=settings.cpus, gpus=settings.gpus_per_worker, quiet=True
    )
    _say_where_few_fit(settings, say)
    uri = storage.join(settings.out, "lease.json")
    with lease.held(uri, settings.out, within=settings.out) as held:
        record = recorded(settings.out)  # by the driver that had the lease before
        if record is not None:
            return Ended(record=record, nothing_to_do=True)
        begun = begin(settings, looked, say)
        say(_start(begun))
        return _train(begun, watch, held)


def _say_where_few_fit(settings: Settings, say: Callable[[str], None]) -> None:
    """Ray waits for the cluster to grow, without a word."""
    wanted = settings.workers_range[0]
    room = cluster.room(settings.cpus, settings.gpus_per_worker)
    if room < wanted:
        say(
            f"the cluster has room for {room} of {wanted} workers of {settings.cpus} CPUs and "
            f"{settings.gpus_per_worker:g} GPUs: waiting for it to grow"
        )


def recorded(out: str) -> dict[str, Any] | None:
    """The record of a finished run, None of one that is not."""
    uri = storage.join(out, checkpoints.RECORD)
    if not storage.exists(uri):
        return None
    record: dict[str, Any] = json.loads(storage.read(uri))
    return record


def _start(begun: Begun) -> str:
    config = begun.task.experiment.optimiser
    done = checkpoints.newest_step(begun.task.out)
    steps = f"{config.max_steps} steps of {config.batch_size} photos"
    workers = " to ".join(map(str, dict.fromkeys(begun.settings.workers)))
    begins = f"going on after step {done}: {steps}" if done else f"training {steps}"
    return f"{begins}, on {workers} worker{'s' if workers != '1' else ''}"


def _train(begun: Begun, watch: Watch, held: Lease) -> Ended:
    started = time.time()
    actor: Any = ray.remote(Board)
    # where the driver is: other nodes may go
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = actor.options(num_cpus=0, scheduling_strategy=here).remote()
    with _Watching(board, watch, held.lost), _interruptible():
        try:
            _trainer(begun, board).fit()
        except KeyboardInterrupt:
            if held.lost.is_set():
                raise RunStoppedError("another driver took the run over") from None
            raise
        except ray.train.TrainingFailedError as error:
            failure = ray.get(board.failure.remote())
            raise RunStoppedError(failure or f"Ray Train gave up: {_cause(error)}") from error
    failure = ray.get(board.failure.remote())
    if failure:
        raise RunStoppedError(failure)
    record = begun.record(checkpoints.latest(begun.task.out), seconds=time.time() - started)
    out = begun.task.out
    storage.write(storage.join(out, checkpoints.RECORD), json.dumps(record, indent=1).encode())
    return Ended(record=record)


def _trainer(begun: Begun, board: Any) -> TorchTrainer:
    settings, task = begun.settings, begun.task
    where = checkpoints.ray_storage(task.out)
    low, high = settings.workers_range
    return TorchTrainer(
        _worker,
        train_loop_config={"task": task, "board": board},
        scaling_config=ScalingConfig(
            num_workers=high if low == high else (low, high),  # type: ignore[arg-type]  # V1's types
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker={"CPU": settings.cpus}
            | ({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}),
        ),
        torch_config=TorchConfig(timeout_s=_PATIENCE_S),
        run_config=RunConfig(
            name=checkpoints.FOLDER,
            storage_path=where.path,
            storage_filesystem=where.filesystem,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    )


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    task: Task = config["task"]
    teller = Teller(config["board"])
    logging.getLogger("pipeline").addHandler(teller)  # what a worker prints, nobody sees
    try:
        loop.train(task, RayGroup.join(), teller)
    finally:
        logging.getLogger("pipeline").removeHandler(teller)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt; Ray Train's own handler ends the process with code 0."""
    ours = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, ours)


def _cause(error: BaseException) -> str:
    """The last line of the innermost error: what a person wants to read."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


class _Watching:
    """Looks at the board every few seconds, as long as it is entered, and tells who watches.

    Where `lost` is set, which says that the run is another driver's now, it interrupts this one.
    """

    def __init__(self, board: Any, watch: Watch, lost: threading.Event) -> None:
        self._board, self._watch, self._lost = board, watch, lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self._once()
            if self._lost.is_set():
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGINT)  # wakes it from whatever it waits for
                return
        self._once()

    def _once(self) -> None:
        try:
            self._watch(ray.get(self._board.watched.remote(), timeout=LOOK_EVERY_S))
        except ray.exceptions.RayError:  # only a display is poorer
            return
