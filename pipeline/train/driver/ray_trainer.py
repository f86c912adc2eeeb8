"""What Ray Train is told: how many workers of which size, where checkpoints go, what each one does.

Enters: a run that was begun, and the board that its workers write on. Leaves: a trainer, to be fit.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from pipeline.runs import ray_connection
from pipeline.train.driver.preflight import PreparedRun
from pipeline.train.driver.status import StatusReporter
from pipeline.train.worker import checkpoints, loop
from pipeline.train.worker.distributed import RayProcessGroup
from pipeline.train.worker.task import WorkerSpec

_PATIENCE_S = 24 * 3600
"""Seconds that a worker waits for another one, which may be slow on val; Ray notices the dead."""


def build_ray_trainer(begun: PreparedRun, board: Any) -> TorchTrainer:
    """Ray Train's trainer of the run, whose workers tell the actor `board` how they do."""
    settings, task = begun.settings, begun.task
    where = checkpoints.ray_storage(task.out)
    low, high = settings.workers_range
    kind = TorchTrainer if ray_connection.has_cluster() else _LocalRayTrainer
    return kind(
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
            callbacks=[_Deaths(board)],  # type: ignore[list-item]  # V1's types
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    )


class _Deaths(UserCallback):
    """Tells the board of the death of a worker, after which Ray Train ends the whole group."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._board.worker_crashed.remote()


class _LocalRayTrainer(TorchTrainer):
    """A trainer on a Ray that this process started, and that ends with it.

    Ray Train has an actor that frees the workers' CPUs should their driver die, for those who
    share a cluster. Without a dashboard, which it asks, that actor takes twelve seconds to end.
    """

    def _create_default_callbacks(self) -> list[Any]:
        every: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # V1's types
        return [each for each in every if type(each).__name__ != "PlacementGroupCleanerCallback"]


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    task: WorkerSpec = config["task"]
    teller = StatusReporter(config["board"])
    logging.getLogger("pipeline").addHandler(teller)  # what a worker prints, nobody sees
    try:
        loop.train(task, RayProcessGroup.join(), teller)
    finally:
        logging.getLogger("pipeline").removeHandler(teller)
