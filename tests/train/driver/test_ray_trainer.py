"""What Ray Train is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from pipeline.train.driver import ray_trainer
from pipeline.train.driver.preflight import inspect_data, prepare
from pipeline.train.driver.ray_trainer import _LocalRayTrainer
from pipeline.train.driver.status import StatusActor
from tests.train import tiny


def callbacks(kind: type[TorchTrainer]) -> list[str]:
    made = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    return [type(each).__name__ for each in made._create_default_callbacks()]  # type: ignore[attr-defined]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_ray_that_ends_with_its_driver_has_nobody_who_frees_its_cpus() -> None:
    everywhere = callbacks(TorchTrainer)
    here = callbacks(_LocalRayTrainer)
    assert set(everywhere) - set(here) == {"PlacementGroupCleanerCallback"}
    assert len(here) == len(everywhere) - 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_dies_leaves_a_board_on_which_none_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(config: dict[str, Any]) -> None:
        ray.get(config["board"].started.remote(2, None))
        os._exit(1)

    monkeypatch.setattr(ray_trainer, "_worker", dies)
    tiny.write_dataset(tmp_path / "set", train=2, val=1)
    settings = tiny.settings(
        tmp_path / "set", tmp_path / "out", tiny.experiment(batch_size=2), max_failures=0
    )
    board: Any = ray.remote(StatusActor).options(num_cpus=0).remote()  # type: ignore[attr-defined]
    begun = prepare(settings, inspect_data(settings, print), print)
    with pytest.raises(TrainingFailedError):
        ray_trainer.build_ray_trainer(begun, board).fit()
    assert ray.get(board.status.remote()).heartbeats == 1
    assert ray.get(board.status.remote()).workers == 0
