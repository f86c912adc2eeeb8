"""Every private name of Ray that the project relies on.

`tests/runs/test_ray_compat.py` has a test for each, so that a new version of Ray that changes one
fails there and names it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ray._private import ray_constants
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

__all__ = [
    "STARTUP_TIMEOUT",
    "ExecutionCallback",
    "batch_context",
    "local_torch_trainer",
    "loopback_only",
    "running_actors",
]

STARTUP_TIMEOUT = "timed out during startup"
"""Part of the message of a local Ray that does not start in time; it has no exception class."""

_CLEANER = "PlacementGroupCleanerCallback"

_INFO_LOGGERS = ("ray.data", "ray.data._internal.execution.streaming_executor")
"""They narrate each execution; only their errors are shown."""

_ERROR_LOGGERS = ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state")
"""They repeat errors of a shard or an execution, which the driver logs itself."""


@contextmanager
def loopback_only() -> Iterator[None]:
    """Make a Ray started in the block listen on the loopback interface only.

    Ray does this by itself where it supports no clusters (Windows, macOS), and has no argument for
    it: given 127.0.0.1, it assumes that other machines should reach it, and picks another address.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def batch_context(
    *,
    callback: type[ExecutionCallback],
    upscaling_threshold: float,
    max_failed_starts: int,
    max_lost_blocks: int,
) -> Iterator[None]:
    """Configure Ray Data for data sets created and executed in the block; then restore it.

    An instance of `callback` is made per execution. An actor pool grows from
    `upscaling_threshold`, the ratio of its tasks to those that it can work on at once. An execution
    fails when `max_failed_starts` actors in a row crash while starting, or after `max_lost_blocks`
    blocks were lost with their actors.
    """
    context = DataContext.get_current().copy()
    context.custom_execution_callback_classes = [callback]
    context.autoscaling_config.actor_pool_util_upscaling_threshold = upscaling_threshold
    context.max_consecutive_actor_init_deaths = max_failed_starts
    context.max_errored_blocks = max_lost_blocks
    context.execution_no_progress_timeout_s = -1  # it would abort a run that waits for a node
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with DataContext.current(context), ExitStack() as stack:
        for name in _INFO_LOGGERS:
            stack.enter_context(_log_level(name, logging.ERROR))
        for name in _ERROR_LOGGERS:
            stack.enter_context(_log_level(name, logging.CRITICAL))
        yield


@contextmanager
def _log_level(name: str, level: int) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def running_actors(executor: Any) -> int:
    """Return how many actors of an execution are ready, not waiting for a node or starting."""
    return sum(operator.get_actor_info().running for operator in executor._topology)


def local_torch_trainer() -> type[TorchTrainer]:
    """Return a trainer class for a local Ray, which ends with its driver.

    Ray Train starts an actor that frees the workers' CPUs if their driver crashes, which only a
    shared cluster needs. Without a dashboard, which it queries, that actor takes 12 s to stop.
    """
    from ray.train.torch import TorchTrainer  # only training needs it

    class LocalTorchTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # V1's types
            return [each for each in callbacks if type(each).__name__ != _CLEANER]

    return LocalTorchTrainer
