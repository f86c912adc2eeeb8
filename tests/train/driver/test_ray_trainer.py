"""The Ray Train trainer: what the status shows after a crash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import TrainingFailedError

from pipeline.train.driver import ray_trainer
from pipeline.train.driver.preflight import inspect_data, prepare
from pipeline.train.driver.status import StatusActor
from tests.train import tiny


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_after_a_worker_crashed_the_status_shows_no_worker_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(config: dict[str, Any]) -> None:
        ray.get(config["status"].started.remote(2, None))
        os._exit(1)

    monkeypatch.setattr(ray_trainer, "_worker", crash)
    tiny.write_dataset(tmp_path / "set", train=2, val=1)
    settings = tiny.settings(
        tmp_path / "set", tmp_path / "out", tiny.experiment(batch_size=2), max_failures=0
    )
    status: Any = ray.remote(StatusActor).options(num_cpus=0).remote()  # type: ignore[attr-defined]
    run = prepare(settings, inspect_data(settings, print), print)
    with pytest.raises(TrainingFailedError):
        ray_trainer.build_ray_trainer(run, status).fit()
    assert ray.get(status.status.remote()).heartbeats == 1
    assert ray.get(status.status.remote()).workers == 0
