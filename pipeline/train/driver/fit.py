"""Entry point of a training run on Ray: check the data, prepare the run, train it, record it.

An interrupted run leaves a complete checkpoint; the same command resumes from it. The driver
computes nothing itself: it checks the data, starts the workers and monitors them.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
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
from pipeline.train.driver.preflight import Log, PreparedRun, inspect_data, prepare
from pipeline.train.driver.ray_trainer import build_ray_trainer
from pipeline.train.driver.run_identity import check_experiment
from pipeline.train.driver.run_monitor import OnStatus, RunMonitor
from pipeline.train.driver.status import StatusActor
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker import checkpoints

MAX_GPU_CPUS = 16
"""CPUs for a worker with a GPU, at most: half of them read and augment images."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The record of a finished run; `nothing_to_do` if it was finished before."""

    record: dict[str, Any]
    nothing_to_do: bool = False


def fit(settings: TrainingSettings, log: Log, on_status: OnStatus) -> TrainingResult:
    """Start a training run, or resume it.

    Raises ValueError (including SampleError and CheckpointError) or StorageError if what the
    settings name cannot be used, lease.HeldError if another driver is working on the run, and
    RunStoppedError if the run cannot continue.
    """
    check_experiment(settings)
    record = load_record(settings.out)
    uri = storage.join(settings.out, "lease.json")
    if record is not None:
        lease.clear_stale(uri, within=settings.out)
        return TrainingResult(record=record, nothing_to_do=True)
    report = inspect_data(settings, log)
    ray_connection.connect(
        workers=settings.max_workers, cpus=settings.cpus, gpus=settings.gpus_per_worker, quiet=True
    )
    settings = _fit_to_cluster(settings, log)
    with lease.hold(uri, settings.out, within=settings.out) as held:
        record = load_record(settings.out)  # written by the previous holder of the lease
        if record is not None:
            return TrainingResult(record=record, nothing_to_do=True)
        run = prepare(settings, report, log)
        log(_summary(run))
        return _train(run, on_status, held)


def _fit_to_cluster(settings: TrainingSettings, log: Log) -> TrainingSettings:
    """Set `cpus_per_worker`, unless given, to the value that allows the most workers.

    Of several such values it is the largest. Logs a line if the cluster has no room for the
    workers yet: it may scale up.
    """
    (wanted, most), gpus = settings.workers_range, settings.gpus_per_worker
    if settings.cpus_per_worker is None and ray_connection.has_cluster():
        # in descending order, since max returns the first of equals
        sizes = range(MAX_GPU_CPUS if gpus else settings.cpus, 0, -1)
        cpus = max(sizes, key=lambda each: min(ray_connection.worker_slots(each, gpus), most))
        if ray_connection.worker_slots(cpus, gpus) >= wanted:
            return replace(settings, cpus_per_worker=cpus)
    slots = ray_connection.worker_slots(settings.cpus, gpus)
    if slots < wanted:
        log(
            f"the cluster has room for {slots} of {wanted} workers with {settings.cpus} CPUs "
            f"(--cpus-per-worker) and {gpus:g} GPUs; waiting for it to scale up"
        )
    return settings


def load_record(out: str) -> dict[str, Any] | None:
    """Return the record of a finished run, or None if the run has not finished."""
    uri = storage.join(out, checkpoints.RECORD)
    if not storage.exists(uri):
        return None
    record: dict[str, Any] = json.loads(storage.read(uri))
    return record


def _summary(run: PreparedRun) -> str:
    config = run.spec.experiment.optimizer
    done = checkpoints.newest_step(run.spec.out)
    steps = f"{config.max_steps} steps of {config.batch_size} images"
    workers = " to ".join(map(str, dict.fromkeys(run.settings.workers)))
    action = f"resuming after step {done}: {steps}" if done else f"training {steps}"
    return f"{action}, on {workers} worker{'s' if workers != '1' else ''}"


def _train(run: PreparedRun, on_status: OnStatus, held: Lease) -> TrainingResult:
    started = time.time()
    actor: Any = ray.remote(StatusActor)
    # on the driver's node: other nodes may be removed
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    status = actor.options(num_cpus=0, scheduling_strategy=here).remote()
    monitor = RunMonitor(status, on_status, held.lost, _stall_timer(run.settings))
    with monitor, _interruptible():
        try:
            build_ray_trainer(run, status).fit()
        except KeyboardInterrupt:
            if monitor.stopped:
                raise RunStoppedError(monitor.stopped) from None
            raise
        except ray.train.TrainingFailedError as error:
            failure = ray.get(status.failure.remote())
            raise RunStoppedError(failure or f"Ray Train failed: {last_line(error)}") from error
    failure = ray.get(status.failure.remote())
    if failure:
        raise RunStoppedError(failure)
    out = run.spec.out
    record = run.record(checkpoints.latest(out), seconds=time.time() - started)
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
    """Raise KeyboardInterrupt on Ctrl-C: Ray Train's own handler exits the process with code 0."""
    ours = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, ours)
