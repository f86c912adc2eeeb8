"""Experiments: JSON round trips, differences between two, and invalid values."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pipeline.model.config import ModelConfig
from pipeline.train.recipes.experiment import (
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    differences,
)
from pipeline.train.recipes.registry import RECIPES
from tests.train import tiny


def test_json_round_trips_give_the_same_experiment() -> None:
    for recipe in RECIPES.values():
        text = recipe.experiment.to_json()
        assert Experiment.from_json(text) == recipe.experiment
        assert Experiment.from_json(text).to_json() == text


def test_the_optimizer_is_stored_under_its_first_spelling() -> None:
    """Renaming the key would make every run of an earlier version another experiment."""
    stored = json.loads(tiny.experiment().to_json())
    assert stored.keys() == {"model", "init", "data", "augment", "optimiser", "evaluation", "seed"}
    stored["optimizer"] = stored.pop("optimiser")
    with pytest.raises(ValueError, match=r"unknown fields \['optimizer'\]"):
        Experiment.from_json(json.dumps(stored))


def test_fields_of_an_older_version_are_filled_in_and_a_newer_one_is_refused() -> None:
    values = json.loads(tiny.experiment().to_json())
    del values["optimiser"]["hard_share"], values["evaluation"], values["seed"]
    found = Experiment.from_json(json.dumps(values))
    assert found.optimizer.hard_share == 1.0
    for part in ("", "optimiser", "model"):
        newer = json.loads(json.dumps(values))
        (newer[part] if part else newer)["warp"] = 9
        with pytest.raises(ValueError, match=r"unknown fields \['warp'\].*newer version"):
            Experiment.from_json(json.dumps(newer))


@pytest.mark.parametrize("text", ["", "[]", '{"optimiser": 3}', '{"optimiser": {"momentum": "a"}}'])
def test_text_that_is_not_an_experiment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"experiment|optimiser|--momentum 'a'"):
        Experiment.from_json(text)


def test_differences_name_the_fields_as_they_are_stored() -> None:
    mine = tiny.experiment()
    theirs = dataclasses.replace(mine, optimizer=OptimizerConfig(), seed=4)
    assert differences(mine.to_json(), mine.to_json()) == []
    found = differences(mine.to_json(), theirs.to_json())
    assert "seed: 0 here, 4 there" in found
    assert "optimiser.base_lr: 0.02 here, 0.007 there" in found
    assert not any(each.startswith(("model", "data")) for each in found)


@pytest.mark.parametrize(
    ("step", "crop"), [(0, (33, 35)), (7, (33, 35)), (8, (49, 50)), (10, (49, 50))]
)
def test_late_crops_start_after_their_fraction_of_the_run(step: int, crop: tuple[int, int]) -> None:
    config = AugmentConfig(crop_size=(33, 35), late_crop_size=(49, 50), late_from=0.75)
    assert config.crop_at(step, 10) == crop
    assert AugmentConfig(crop_size=(33, 35)).crop_at(step, 10) == (33, 35)


def test_remaining_steps_are_weighted_by_their_crop_size() -> None:
    augment = AugmentConfig(crop_size=(20, 30), late_crop_size=(40, 45), late_from=0.75)
    # six steps of 600 pixels and two of 1,800
    assert augment.steps_like(0, 8) == 6 + 2 * 3
    assert augment.steps_like(5, 8) == 1 + 2 * 3
    assert augment.steps_like(6, 8) == 2
    assert augment.steps_like(8, 8) == 0
    assert dataclasses.replace(augment, late_crop_size=None).steps_like(0, 8) == 8


INVALID: list[tuple[type, dict[str, Any], str]] = [
    (DataConfig, {"repeats": 0}, "--repeats 0"),
    (AugmentConfig, {"crop_size": (0, 33)}, "--crop-size 0 33"),
    (AugmentConfig, {"late_crop_size": (33, -1)}, "--late-crop-size 33 -1"),
    (AugmentConfig, {"min_scale": 0}, "--min-scale 0 --max-scale"),
    (AugmentConfig, {"min_scale": 2.0, "max_scale": 1.0}, "0 < min-scale <= max-scale"),
    (AugmentConfig, {"max_scale": float("inf")}, "--max-scale inf: must be .* max-scale <= 8"),
    (AugmentConfig, {"max_scale": float("nan")}, "--max-scale nan"),
    (AugmentConfig, {"late_from": 1.0}, "--late-from 1.0"),
    (OptimizerConfig, {"max_steps": 0}, "--max-steps 0"),
    (OptimizerConfig, {"batch_size": 0}, "--batch-size 0"),
    (OptimizerConfig, {"micro_batch": 0}, "--micro-batch 0"),
    (OptimizerConfig, {"base_lr": 0}, "--base-lr 0"),
    (OptimizerConfig, {"base_lr": float("nan")}, "--base-lr nan"),
    (OptimizerConfig, {"base_lr": float("inf")}, "--base-lr inf: must be over 0 and finite"),
    (OptimizerConfig, {"power": float("inf")}, "--power inf"),
    (OptimizerConfig, {"weight_decay": -1.0}, "--weight-decay -1: must be at least 0"),
    (
        OptimizerConfig,
        {"weight_decay": float("nan")},
        "--weight-decay nan: must be at least 0 and finite",
    ),
    (OptimizerConfig, {"auxiliary_weight": float("inf")}, "--auxiliary-weight inf"),
    (OptimizerConfig, {"hard_share": 0}, "--hard-share 0"),
    (OptimizerConfig, {"hard_share": 1.5}, "--hard-share 1.5"),
    (OptimizerConfig, {"ema_decay": 1.0}, "--ema-decay 1.0"),
    (OptimizerConfig, {"momentum": -0.1}, "--momentum -0.1"),
    (EvaluationConfig, {"eval_every": -1}, "--eval-every -1"),
    (EvaluationConfig, {"eval_scales": ()}, "--eval-scales without a value"),
    (EvaluationConfig, {"eval_scales": (1.0, 0.0)}, "each over 0"),
    (EvaluationConfig, {"eval_scales": (1.0, float("inf"))}, "inf: give one .* at most 8"),
    (EvaluationConfig, {"eval_scales": (float("nan"),)}, "--eval-scales nan"),
    (Experiment, {"seed": -1}, "--seed -1"),
]


@pytest.mark.parametrize(("part", "values", "message"), INVALID)
def test_an_invalid_value_is_refused_by_its_flag(
    part: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        part(**values)


def test_values_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="--eval-output-stride 7"):
        Experiment(evaluation=EvaluationConfig(eval_output_stride=7))
    odd = ModelConfig(atrous_rates=(3,))
    with pytest.raises(ValueError, match=r"--eval-output-stride 32.*must be integers"):
        Experiment(model=odd, evaluation=EvaluationConfig(eval_output_stride=32))
    with pytest.raises(ValueError, match=r"--no-upsample-logits .*give --no-auxiliary"):
        Experiment(model=tiny.RESNET, optimizer=OptimizerConfig(upsample_logits=False))
