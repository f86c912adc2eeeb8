"""The Ray Train trainer of a run: the workers, where checkpoints go, what each worker runs."""

from __future__ import annotations

import logging
from typing import Any

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.runs import ray_compat, ray_connection
from pipeline.train.driver.preflight import PreparedRun
from pipeline.train.driver.status import StatusReporter
from pipeline.train.worker import checkpoints, loop
from pipeline.train.worker.distributed import RayProcessGroup
from pipeline.train.worker.task import WorkerSpec

_COLLECTIVE_TIMEOUT_S = 24 * 3600
"""A worker may wait this long for one that is slow on val; Ray notices those that crash."""


def build_ray_trainer(run: PreparedRun, status: Any) -> TorchTrainer:
    """Return Ray Train's trainer of the run, whose workers report to the actor `status`."""
    settings, spec = run.settings, run.spec
    target = checkpoints.ray_storage(spec.out)
    low, high = settings.workers_range
    on_cluster = ray_connection.has_cluster()
    trainer = TorchTrainer if on_cluster else ray_compat.local_torch_trainer()
    return trainer(
        _worker,
        train_loop_config={"spec": spec, "status": status},
        scaling_config=ScalingConfig(
            num_workers=high if low == high else (low, high),  # type: ignore[arg-type]  # V1's types
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker={"CPU": settings.cpus}
            | ({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}),
        ),
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            name=checkpoints.FOLDER,
            storage_path=target.path,
            storage_filesystem=target.filesystem,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            callbacks=[_CrashCallback(status)],  # type: ignore[list-item]  # V1's types
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    )


class _CrashCallback(UserCallback):
    """The callback that reports a crashed worker, after which Ray Train stops the whole group."""

    def __init__(self, status: Any) -> None:
        self._status = status

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._status.worker_crashed.remote()


def _worker(config: dict[str, Any]) -> None:
    """Run the training loop; Ray Train calls this on every worker."""
    spec: WorkerSpec = config["spec"]
    reporter = StatusReporter(config["status"])
    # the driver does not show what a worker prints
    logging.getLogger("pipeline").addHandler(reporter)
    try:
        loop.train(spec, RayProcessGroup.join(), reporter)
    finally:
        logging.getLogger("pipeline").removeHandler(reporter)
