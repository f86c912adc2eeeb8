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
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.data import storage
from pipeline.runs import lease, ray_connection
from pipeline.runs.lease import Lease
from pipeline.runs.ray_connection import RunStoppedError
from pipeline.runs.timeouts import StallTimer
from pipeline.text import last_line
from pipeline.train.driver.preflight import PreparedRun, inspect_data, prepare
from pipeline.train.driver.ray_trainer import build_ray_trainer
from pipeline.train.driver.run_identity import check_experiment
from pipeline.train.driver.status import Status, StatusActor
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker import checkpoints

POLL_EVERY_S = 2.0

GPU_CPUS = 16
"""CPUs for a worker with a GPU, at most: half of them read and augment photos."""

logger = logging.getLogger(__name__)

OnStatus = Callable[[Status], None]
"""Is told how far the run is, every few seconds."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended: its record, and whether it had ended before."""

    record: dict[str, Any]
    nothing_to_do: bool = False


def fit(settings: TrainingSettings, say: Callable[[str], None], watch: OnStatus) -> TrainingResult:
    """Trains what the settings say, or what is left of it.

    Raises ValueError (SampleError and CheckpointError are ones) or StorageError for what the
    settings name and cannot be used, lease.HeldError where another driver works on the run,
    RunStoppedError where it cannot go on.
    """
    check_experiment(settings)
    record = load_record(settings.out)
    uri = storage.join(settings.out, "lease.json")
    if record is not None:
        lease.clear_stale(uri, within=settings.out)
        return TrainingResult(record=record, nothing_to_do=True)
    looked = inspect_data(settings, say)
    ray_connection.connect(
        workers=settings.max_workers, cpus=settings.cpus, gpus=settings.gpus_per_worker, quiet=True
    )
    settings = _fit_to_cluster(settings, say)
    with lease.hold(uri, settings.out, within=settings.out) as held:
        record = load_record(settings.out)  # by the driver that had the lease before
        if record is not None:
            return TrainingResult(record=record, nothing_to_do=True)
        begun = prepare(settings, looked, say)
        say(_start(begun))
        return _train(begun, watch, held)


def _fit_to_cluster(settings: TrainingSettings, say: Callable[[str], None]) -> TrainingSettings:
    """The settings, with the CPUs a worker, unless they are given, that give the most workers.

    Among these it is the most that the cluster's nodes have. Where it has no room for the workers,
    that is said: it may grow.
    """
    (wanted, most), gpus = settings.workers_range, settings.gpus_per_worker
    if settings.cpus_per_worker is None and ray_connection.has_cluster():
        # the largest first: of those that give as many workers, max takes the first
        sizes = range(GPU_CPUS if gpus else settings.cpus, 0, -1)
        cpus = max(sizes, key=lambda each: min(ray_connection.worker_slots(each, gpus), most))
        if ray_connection.worker_slots(cpus, gpus) >= wanted:
            return replace(settings, cpus_per_worker=cpus)
    room = ray_connection.worker_slots(settings.cpus, gpus)
    if room >= wanted:
        return settings
    say(
        f"the cluster has room for {room} of {wanted} workers of {settings.cpus} CPUs "
        f"(--cpus-per-worker) and {gpus:g} GPUs: waiting for it to grow"
    )
    return settings


def load_record(out: str) -> dict[str, Any] | None:
    """The record of a finished run, None of one that is not."""
    uri = storage.join(out, checkpoints.RECORD)
    if not storage.exists(uri):
        return None
    record: dict[str, Any] = json.loads(storage.read(uri))
    return record


def _start(begun: PreparedRun) -> str:
    config = begun.task.experiment.optimizer
    done = checkpoints.newest_step(begun.task.out)
    steps = f"{config.max_steps} steps of {config.batch_size} photos"
    workers = " to ".join(map(str, dict.fromkeys(begun.settings.workers)))
    begins = f"going on after step {done}: {steps}" if done else f"training {steps}"
    return f"{begins}, on {workers} worker{'s' if workers != '1' else ''}"


def _train(begun: PreparedRun, watch: OnStatus, held: Lease) -> TrainingResult:
    started = time.time()
    actor: Any = ray.remote(StatusActor)
    # where the driver is: other nodes may go
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = actor.options(num_cpus=0, scheduling_strategy=here).remote()
    watching = _RunMonitor(board, watch, held.lost, _stall_timer(begun.settings))
    with watching, _interruptible():
        try:
            build_ray_trainer(begun, board).fit()
        except KeyboardInterrupt:
            if watching.stopped:
                raise RunStoppedError(watching.stopped) from None
            raise
        except ray.train.TrainingFailedError as error:
            failure = ray.get(board.failure.remote())
            raise RunStoppedError(failure or f"Ray Train gave up: {last_line(error)}") from error
    failure = ray.get(board.failure.remote())
    if failure:
        raise RunStoppedError(failure)
    record = begun.record(checkpoints.latest(begun.task.out), seconds=time.time() - started)
    out = begun.task.out
    storage.write(storage.join(out, checkpoints.RECORD), json.dumps(record, indent=1).encode())
    return TrainingResult(record=record)


def _stall_timer(settings: TrainingSettings) -> StallTimer:
    return StallTimer(
        cpus=settings.cpus,
        gpus=settings.gpus_per_worker,
        start_timeout_s=settings.start_timeout,
        stall_timeout_s=settings.stall_timeout,
        missing="no step was completed",
    )


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


class _RunMonitor:
    """Looks at the board every few seconds, as long as it is entered, and tells who watches.

    It interrupts this driver, `stopped` saying why, where `lost` is set, which says that the run is
    another one's now, and where `timer` says so: Ray notices the dead, not those that are stuck.
    """

    def __init__(
        self, board: Any, watch: OnStatus, lost: threading.Event, timer: StallTimer
    ) -> None:
        self.stopped = ""
        self._board, self._watch, self._lost, self._stall_timer = board, watch, lost, timer
        self._unshown = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(POLL_EVERY_S):
            try:
                self._once()
            except RunStoppedError as error:
                self.stopped = str(error)
            if self._lost.is_set():
                self.stopped = "another driver took the run over"
            if self.stopped:
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGINT)  # wakes it from whatever it waits for
                return
        with contextlib.suppress(RunStoppedError):  # it has ended
            self._once()

    def _once(self) -> None:
        try:
            seen: Status = ray.get(self._board.status.remote(), timeout=POLL_EVERY_S)
            self._show(seen)
            self._stall_timer.check(seen.workers, seen.heartbeats)
        except ray.exceptions.RayError:  # only a display is poorer
            return

    def _show(self, seen: Status) -> None:
        """Tells who watches, whose errors (a terminal that is gone) are no reason to look away."""
        try:
            self._watch(seen)
        except Exception as error:  # whatever it prints to
            if not self._unshown:
                logger.warning("how the run goes cannot be shown: %s", error)
            self._unshown = True
