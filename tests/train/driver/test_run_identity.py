"""A run is resumed only with the experiment, images and labels that it was started with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.train.driver import run_identity
from pipeline.train.driver.preflight import inspect_data, prepare
from pipeline.train.recipes.experiment import Experiment
from tests.train import tiny


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Path:
    """Return where a run was started."""
    tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
    return tmp_path / "out"


def rewrite(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the stored identity of a run."""
    path = out / "run.json"
    identity = json.loads(path.read_text())
    change(identity)
    path.write_text(json.dumps(identity))


def test_run_json_holds_the_experiment_and_the_keys_that_are_compared(out: Path) -> None:
    stored = json.loads((out / "run.json").read_text())
    assert Experiment.from_json(json.dumps(stored["experiment"])) == tiny.experiment()
    assert tuple(stored) == run_identity.KEYS


def test_another_experiment_or_other_images_under_the_same_out_are_refused(
    root: Path, out: Path
) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    # a setting that does not affect the result may change
    tiny.worker_spec(root, out, tiny.experiment(), checkpoint_every=77)
    with pytest.raises(
        ValueError, match=r"another run \(experiment.optimiser.base_lr: 0.5 here, 0.02 there\)"
    ):
        tiny.worker_spec(root, out, tiny.experiment(base_lr=0.5))
    (root / "train" / "images" / "02.jpg").unlink()
    (root / "train" / "labels" / "02.png").unlink()
    with pytest.raises(ValueError, match=r"another run.*photos"):
        tiny.worker_spec(root, out, tiny.experiment())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("recorded", [True, False])
def test_labels_that_changed_since_the_start_are_refused_if_they_were_recorded(
    root: Path, out: Path, recorded: bool
) -> None:
    def forget(identity: dict[str, Any]) -> None:  # as the first versions wrote it
        for name in run_identity.NOT_RECORDED:
            del identity[name]

    if not recorded:
        rewrite(out, forget)
    settings = tiny.settings(root, out, tiny.experiment())
    inspect_data(settings, print)
    path = root / "train/labels/02.png"
    Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    if recorded:
        with pytest.raises(ValueError, match=r"out holds another run \(labels: .*; train_labels: "):
            inspect_data(settings, print)
    else:
        inspect_data(settings, print)


def test_a_run_that_lacks_a_field_has_the_value_its_version_implied(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(identity: dict[str, Any]) -> None:
        experiment = identity["experiment"]
        del experiment["optimiser"]["hard_share"], experiment["model"]["dropout"]
        del experiment["seed"]

    rewrite(out, older)
    lacking = r"another run \(experiment.model.dropout: 0.1 here, missing there; experiment.opt"
    with pytest.raises(ValueError, match=lacking):
        tiny.worker_spec(root, out, tiny.experiment())
    # half of the pixels: the table decides, not today's default
    added = {"optimiser.hard_share": 0.5, "model.dropout": 0.1, "seed": 0}
    monkeypatch.setattr(run_identity, "ADDED_LATER", added)
    tiny.worker_spec(root, out, tiny.experiment(hard_share=0.5))
    with pytest.raises(ValueError, match=r"another run \(.*hard_share: 1.0 here, 0.5 there\)"):
        tiny.worker_spec(root, out, tiny.experiment())


def test_a_run_of_a_newer_version_is_refused_by_its_unknown_field(root: Path, out: Path) -> None:
    rewrite(out, lambda identity: identity["experiment"].update(warp=9))
    with pytest.raises(ValueError, match=r"run.json cannot be resumed: .*\['warp'\]"):
        tiny.worker_spec(root, out, tiny.experiment())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("train/labels/02.png", "train_labels"),  # mirrored: the same counts
        ("train/images/02.jpg", "train_photos"),
        ("val/labels/01.png", "val_labels"),
        ("val/images/01.jpg", "val_photos"),
    ],
)
def test_files_that_were_replaced_since_the_start_are_refused(
    root: Path, out: Path, name: str, key: str
) -> None:
    Image.fromarray(np.array(Image.open(root / name))[:, ::-1].copy()).save(root / name)
    with pytest.raises(ValueError, match=rf"another run \({key}: .*arguments and files"):
        tiny.worker_spec(root, out, tiny.experiment())


def test_a_copy_of_the_dataset_is_the_same_run_and_is_surveyed_once(
    root: Path, out: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    settings, lines = tiny.settings(copy, out, tiny.experiment()), []
    for _ in range(2):
        prepare(settings, inspect_data(settings, lines.append), lines.append)
    assert [line.rpartition(" ")[2] for line in lines] == ["val", "train"]
