"""Contract tests of `ray_compat`: they fail if Ray changes a private name that it uses."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from dataclasses import fields
from typing import Any, ClassVar

import pytest
import ray
from ray._private import node, ray_constants, services
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.actor_autoscaler import default_actor_autoscaler
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data.context import AutoscalingConfig
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from pipeline.runs import ray_compat
from pipeline.runs.ray_compat import ExecutionCallback


class _Observer(ExecutionCallback):
    """Records how many actors run at each step of an execution."""

    running: ClassVar[list[int]] = []

    def on_execution_step(self, executor: Any) -> None:
        _Observer.running.append(ray_compat.running_actors(executor))


def _batch_context() -> Any:
    return ray_compat.batch_context(
        callback=_Observer, upscaling_threshold=1.25, max_failed_starts=7, max_lost_blocks=77
    )


def _settings(context: DataContext) -> dict[str, Any]:
    return {each.name: getattr(context, each.name) for each in fields(context)}


def _levels() -> dict[str, int]:
    names = (*ray_compat._INFO_LOGGERS, *ray_compat._ERROR_LOGGERS)
    return {name: logging.getLogger(name).level for name in names}


def test_ray_is_the_version_that_these_names_were_checked_with() -> None:
    assert ray.__version__.startswith("2.60.")


def test_ray_still_chooses_loopback_if_clusters_are_disabled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray._private.worker._global_node", None)
    before = ray_constants.ENABLE_RAY_CLUSTER
    with ray_compat.loopback_only():
        assert services.get_node_ip_address() in ("127.0.0.1", "::1")
    assert ray_constants.ENABLE_RAY_CLUSTER is before is True


def test_ray_still_says_timed_out_during_startup() -> None:
    assert ray_compat.STARTUP_TIMEOUT in inspect.getsource(node)


def test_ray_data_still_calls_back_at_each_step_with_the_executor() -> None:
    assert list(inspect.signature(ExecutionCallback.on_execution_step).parameters) == [
        "self",
        "executor",
    ]
    assert _Observer not in DataContext.get_current().execution_callback_classes
    with _batch_context():
        assert _Observer in DataContext.get_current().execution_callback_classes


def test_operators_of_an_execution_still_tell_their_running_actors() -> None:
    assert StreamingExecutor(DataContext())._topology is None
    info = inspect.signature(PhysicalOperator.get_actor_info).return_annotation
    assert "running" in {each.name for each in fields(info)}


def test_every_setting_of_a_batch_is_still_a_field_of_ray_datas_context() -> None:
    before = _settings(DataContext.get_current())
    with _batch_context():
        context = DataContext.get_current()
        inside = _settings(context)
        # an attribute that is not a field would be stored without effect
        assert set(vars(context)) == set(vars(DataContext()))
    changed = {name for name in before if before[name] != inside[name]}
    assert changed <= {
        "autoscaling_config",
        "custom_execution_callback_classes",
        "enable_progress_bars",
        "execution_no_progress_timeout_s",
        "max_consecutive_actor_init_deaths",
        "max_errored_blocks",
        "print_on_execution_start",
    }
    assert inside["max_errored_blocks"] == 77
    assert inside["max_consecutive_actor_init_deaths"] == 7
    assert inside["execution_no_progress_timeout_s"] == -1
    names = {each.name for each in fields(AutoscalingConfig)}
    assert set(vars(inside["autoscaling_config"])) == names
    assert inside["autoscaling_config"].actor_pool_util_upscaling_threshold == 1.25
    assert "config.actor_pool_util_upscaling_threshold" in inspect.getsource(
        default_actor_autoscaler
    )


@pytest.mark.parametrize("name", [*ray_compat._INFO_LOGGERS, *ray_compat._ERROR_LOGGERS])
def test_every_logger_of_ray_data_that_is_quieted_still_exists(name: str) -> None:
    module = importlib.import_module(name)
    if name != "ray.data":  # the parent of them all
        assert module.logger.name == name


@pytest.mark.parametrize("error", [None, ValueError("stopped")])
def test_ray_datas_context_and_log_levels_are_restored_after_a_batch(
    error: Exception | None,
) -> None:
    context = DataContext.get_current()
    before, levels = _settings(context), _levels()
    with contextlib.suppress(ValueError), _batch_context():
        assert DataContext.get_current() is not context
        assert _levels() != levels
        if error is not None:
            raise error
    assert DataContext.get_current() is context
    assert _settings(context) == before
    assert _levels() == levels


class _Doubles:
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"item": 2 * batch["item"]}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_an_execution_shows_its_running_actors_to_the_callback() -> None:
    ray.cloudpickle.register_pickle_by_value(importlib.import_module(__name__))
    _Observer.running.clear()
    with _batch_context():
        doubled = ray.data.from_items([1, 2, 3], override_num_blocks=3).map_batches(
            _Doubles, batch_size=1, compute=ActorPoolStrategy(min_size=1, max_size=1), num_cpus=1
        )
        assert sorted(row["item"] for row in doubled.iter_rows()) == [2, 4, 6]
    assert _Observer.running[0] == 0
    assert max(_Observer.running) == 1


def test_a_local_trainer_still_lacks_only_the_callback_that_frees_the_workers_cpus() -> None:
    def callbacks(kind: type[TorchTrainer]) -> list[str]:
        trainer: Any = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1))
        return [type(each).__name__ for each in trainer._create_default_callbacks()]

    on_cluster, local = callbacks(TorchTrainer), callbacks(ray_compat.local_torch_trainer())
    assert sorted(on_cluster) == sorted([*local, ray_compat._CLEANER])
