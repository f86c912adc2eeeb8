"""Settings of a training run: invalid ones are refused in one line, before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.train.recipes.registry import by_name
from pipeline.train.settings import TrainingSettings
from tests.train import tiny

POOLED = replace(tiny.MOBILENET, image_pooling=True)


def make_settings(*, batch_size: int = 8, pooled: bool = False, **values: Any) -> TrainingSettings:
    optimizer = {key: values.pop(key) for key in ("micro_batch", "freeze_bn") if key in values}
    experiment = tiny.experiment(batch_size=batch_size, **optimizer)
    experiment = replace(experiment, model=POOLED) if pooled else experiment
    return TrainingSettings(**{"data": "d", "out": "o", "experiment": experiment, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": ()}, "give a number, or MIN MAX"),
        ({"workers": (0,)}, "--workers 0: give a number"),
        ({"workers": (3, 2)}, "--workers 3 2: give a number, or MIN MAX"),
        ({"workers": (1, 2, 3)}, "--workers 1 2 3"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker 0"),
        ({"gpus_per_worker": -1.0}, "--gpus-per-worker -1"),
        ({"gpus_per_worker": 0.5, "workers": (1, 2)}, "workers that share a GPU cannot"),
        ({"loaders": -1}, "--loaders -1"),
        ({"checkpoint_every": 0}, "--checkpoint-every 0"),
        ({"stall_timeout": 0}, "--stall-timeout 0"),
        ({"max_failures": -7}, "--max-failures -7: must be at least 0; 0 stops"),
        ({"cache_gb": -1.0}, "--cache-gb -1: must be at least 0 and finite"),
        ({"cache_gb": float("nan")}, "--cache-gb nan"),
        ({"cache_gb": float("inf")}, "--cache-gb inf"),
        ({"out": "s3://bucket"}, "must be a prefix below the bucket"),
        ({"out": "gs://bucket/x"}, "neither s3://bucket/prefix nor a local path"),
        ({"batch_size": 3, "workers": (4,)}, "with 4 workers: each worker needs an image"),
        ({"batch_size": 3, "workers": (1, 4)}, "give at most --workers 3"),
        ({"batch_size": 1, "pooled": True}, "a single image, and batch normalization after image"),
        ({"batch_size": 5, "workers": (3,), "pooled": True}, "on 3 workers .* a single image"),
        ({"batch_size": 9, "micro_batch": 4, "pooled": True}, "on 1 workers .* a single image"),
        ({"micro_batch": 1, "pooled": True}, "a single image"),
        # 1 and 3 workers would work, but not the 2 between them
        ({"batch_size": 10, "micro_batch": 4, "workers": (1, 3), "pooled": True}, "on 2 workers"),
        (
            {"batch_size": 9, "micro_batch": 4, "workers": (2,), "gpus_per_worker": 1},
            "a micro-batch more than the others",
        ),
    ],
)
def test_invalid_settings_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_settings(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 1},
        {"batch_size": 1, "pooled": True, "freeze_bn": True},
        {"batch_size": 3, "workers": (3,)},
        {"batch_size": 4, "workers": (2,), "pooled": True},
        {"batch_size": 4, "workers": (4,), "pooled": True, "gpus_per_worker": 1},
        {"batch_size": 8, "micro_batch": 4, "workers": (1, 2), "pooled": True},
    ],
)
def test_valid_settings_are_accepted(values: dict[str, Any]) -> None:
    assert make_settings(**values).max_workers >= 1


def test_every_recipe_of_table_11_runs_on_its_number_of_replicas() -> None:
    for replicas in (1, 2, 4, 8, 16, 32):
        recipe = by_name(f"table11-replicas{replicas}")
        TrainingSettings(
            data="d", out="o", workers=(replicas,), gpus_per_worker=1.0,
            experiment=recipe.experiment,
        )  # fmt: skip
