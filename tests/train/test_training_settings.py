"""Settings of a training run: invalid ones are refused in one line, before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.train.driver import run_identity
from pipeline.train.driver.preflight import inspect_data, prepare
from pipeline.train.recipes.experiment import Experiment
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


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write_dataset(tmp_path / "set", train=3, val=2)
    return tmp_path / "set"


def looked(root: Path, out: Path, what: Experiment, **more: Any) -> None:
    settings = tiny.settings(root, out, what, **more)
    prepare(settings, inspect_data(settings, print), print)


def test_another_experiment_or_other_photos_under_the_same_out_are_refused_by_name(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    looked(root, out, tiny.experiment())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    looked(root, out, tiny.experiment(), checkpoint_every=77)  # what decides no result may differ
    with pytest.raises(
        ValueError, match=r"another run \(experiment.optimiser.base_lr: 0.5 here, 0.02 there\)"
    ):
        looked(root, out, tiny.experiment(base_lr=0.5))
    (root / "train" / "images" / "02.jpg").unlink()
    (root / "train" / "labels" / "02.png").unlink()
    with pytest.raises(ValueError, match=r"another run.*photos"):
        looked(root, out, tiny.experiment())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_begins_with_the_same_network_on_every_machine_and_says_what_it_is(
    root: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name) + ord(name))
        looked(root, tmp_path / name, tiny.experiment())
    one, other = ((tmp_path / name / "initial.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other
    stored = json.loads((tmp_path / "a" / "run.json").read_text())
    assert Experiment.from_json(json.dumps(stored["experiment"])) == tiny.experiment()
    assert tuple(stored) == run_identity.KEYS


@pytest.mark.parametrize("known", [True, False])
def test_labels_that_changed_since_the_run_began_are_refused(
    root: Path, tmp_path: Path, known: bool
) -> None:
    settings = tiny.settings(root, tmp_path / "out", tiny.experiment())
    prepare(settings, inspect_data(settings, print), print)
    run = tmp_path / "out" / "run.json"
    if not known:  # a run that was begun when labels were not looked at so closely
        before = json.loads(run.read_text())
        for name in ("labels", "train_photos", "train_labels", "val_photos", "val_labels"):
            del before[name]
        run.write_text(json.dumps(before))
    inspect_data(settings, print)
    path = root / "train/labels/02.png"
    Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    if known:
        with pytest.raises(ValueError, match=r"out holds another run \(labels: .*; train_labels: "):
            inspect_data(settings, print)
    else:
        inspect_data(settings, print)


def rewritten(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the experiment that run.json says."""
    before = json.loads(run.read_text())
    change(before["experiment"])
    run.write_text(json.dumps(before))


def test_a_run_that_lacks_a_field_has_the_value_its_version_implied(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(experiment: dict[str, Any]) -> None:
        del experiment["optimiser"]["hard_share"], experiment["model"]["dropout"]
        del experiment["seed"]

    looked(root, tmp_path / "out", tiny.experiment())
    rewritten(tmp_path / "out" / "run.json", older)
    lacking = r"another run \(experiment.model.dropout: 0.1 here, missing there; experiment.opt"
    with pytest.raises(ValueError, match=lacking):
        looked(root, tmp_path / "out", tiny.experiment())
    # half of the pixels: the table counts, not today's default
    added = {"optimiser.hard_share": 0.5, "model.dropout": 0.1, "seed": 0}
    monkeypatch.setattr(run_identity, "ADDED_LATER", added)
    looked(root, tmp_path / "out", tiny.experiment(hard_share=0.5))
    with pytest.raises(ValueError, match=r"another run \(.*hard_share: 1.0 here, 0.5 there\)"):
        looked(root, tmp_path / "out", tiny.experiment())


def test_a_run_of_a_newer_version_is_refused_by_its_unknown_field(
    root: Path, tmp_path: Path
) -> None:
    looked(root, tmp_path / "out", tiny.experiment())
    rewritten(tmp_path / "out" / "run.json", lambda experiment: experiment.update(warp=9))
    with pytest.raises(ValueError, match=r"run.json cannot be gone on with: .*\['warp'\]"):
        looked(root, tmp_path / "out", tiny.experiment())


def mirror(path: Path) -> None:
    Image.fromarray(np.array(Image.open(path))[:, ::-1].copy()).save(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train/labels/02.png", "train_labels: "),  # the same counts
        ("train/images/02.jpg", "train_photos: "),
        ("val/labels/01.png", "val_labels: "),
        ("val/images/01.jpg", "val_photos: "),
    ],
)
def test_files_that_were_replaced_since_the_run_began_are_refused(
    root: Path, tmp_path: Path, name: str, said: str
) -> None:
    looked(root, tmp_path / "out", tiny.experiment())
    mirror(root / name)
    with pytest.raises(ValueError, match=rf"another run \({said}.*arguments and files that"):
        looked(root, tmp_path / "out", tiny.experiment())


def test_a_copy_of_the_photos_with_other_times_is_the_same_run_and_is_looked_at_once(
    root: Path, tmp_path: Path
) -> None:
    looked(root, tmp_path / "out", tiny.experiment())
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    settings, lines = tiny.settings(copy, tmp_path / "out", tiny.experiment()), []
    for _ in range(2):
        prepare(settings, inspect_data(settings, lines.append), lines.append)
    assert [line.rpartition(" ")[2] for line in lines] == ["val", "train"]


def test_every_recipe_of_table_11_runs_on_its_number_of_replicas() -> None:
    for replicas in (1, 2, 4, 8, 16, 32):
        recipe = by_name(f"table11-replicas{replicas}")
        TrainingSettings(
            data="d", out="o", workers=(replicas,), gpus_per_worker=1.0,
            experiment=recipe.experiment,
        )  # fmt: skip
