"""What a person says about a run: refused in one line where it cannot be, before it begins."""

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

from pipeline.data import storage
from pipeline.data.samples import SampleError
from pipeline.model import weights
from pipeline.train.driver.estimate import estimate
from pipeline.train.driver.preflight import inspect_data, prepare
from pipeline.train.recipes.experiment import AugmentConfig, Experiment
from pipeline.train.recipes.registry import by_name
from pipeline.train.settings import TrainingSettings
from tests.train import tiny

POOLED = replace(tiny.MOBILENET, image_pooling=True)


def said(*, batch_size: int = 8, pooled: bool = False, **values: Any) -> TrainingSettings:
    optimiser = {key: values.pop(key) for key in ("micro_batch", "freeze_bn") if key in values}
    what = tiny.experiment(batch_size=batch_size, **optimiser)
    what = replace(what, model=POOLED) if pooled else what
    return TrainingSettings(**{"data": "d", "out": "o", "experiment": what, **values})


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
        # four and three each would do, but not the number between them
        ({"batch_size": 10, "micro_batch": 4, "workers": (1, 3), "pooled": True}, "on 2 workers"),
        (
            {"batch_size": 9, "micro_batch": 4, "workers": (2,), "gpus_per_worker": 1},
            "a micro-batch more than the others",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        said(**values)
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
def test_what_can_be_is_taken(values: dict[str, Any]) -> None:
    assert said(**values).max_workers >= 1


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write_dataset(tmp_path / "set", train=3, val=2)
    return tmp_path / "set"


def looked(root: Path, out: Path, what: Experiment, **more: Any) -> None:
    settings = tiny.settings(root, out, what, **more)
    prepare(settings, inspect_data(settings, print), print)


def changed(what: Experiment, part: str, **values: Any) -> Experiment:
    return replace(what, **{part: replace(getattr(what, part), **values)})


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "data",
            {"classes": "camvid"},
            "has 11 classes, but the network has 4; give --num-classes 11",
        ),
        ("data", {"classes": "cats"}, "classes 'cats': must be voc"),
        ("data", {"classes": '{"names": 4}'}, "--classes: names of the classes is 4"),
        ("data", {"train_split": "test"}, "test"),
        ("data", {"repeat_classes": ("horse",)}, "--repeat-classes 'horse': not a class"),
        ("data", {"layout": "voc"}, "folders"),
    ],
)
def test_data_that_does_not_fit_is_refused_and_nothing_is_written(
    root: Path, tmp_path: Path, part: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        looked(root, tmp_path / "out", changed(tiny.experiment(), part, **values))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_labels_that_cannot_be_trained_on_are_named_before_anything_starts(
    root: Path, tmp_path: Path
) -> None:
    label = root / "train" / "labels" / "01.png"
    whole = label.read_bytes()
    size = Image.open(label).size
    for picture, message in (
        (Image.new("L", size, 37), "class 37, but num_classes is 4; is ignore_index"),
        (Image.new("RGB", size, (1, 2, 3)), "color"),
        (Image.new("L", (5, 7), 1), "its image is"),
    ):
        picture.save(label)
        with pytest.raises(SampleError, match=message) as error:
            looked(root, tmp_path / "out", tiny.experiment())
        assert error.value.uri == str(label)
    label.unlink()
    with pytest.raises(ValueError, match="01"):
        looked(root, tmp_path / "out", tiny.experiment())
    assert not (tmp_path / "out").exists()
    label.write_bytes(whole)
    looked(root, tmp_path / "out", tiny.experiment())


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
    said_to_be = json.loads((tmp_path / "a" / "run.json").read_text())["experiment"]
    assert Experiment.from_json(json.dumps(said_to_be)) == tiny.experiment()


def test_a_start_from_other_classes_makes_the_last_layer_anew_and_says_so(
    root: Path, tmp_path: Path
) -> None:
    three = tiny.network(replace(tiny.MOBILENET, num_classes=3))
    start = tmp_path / "three.safetensors"
    classes = tiny.CLASSES.from_dict({"names": ["a", "b", "c"]})
    start.write_bytes(weights.to_bytes(three, classes))
    what = replace(tiny.experiment(), init=str(start))
    settings, lines = tiny.settings(root, tmp_path / "out", what), []
    prepare(settings, inspect_data(settings, lines.append), lines.append)
    assert any(
        "has 3 classes instead of 4: its last layer is reinitialized" in line for line in lines
    )
    found, _ = weights.load(storage.join(settings.out, "initial.safetensors"))
    state, before = found.state_dict(), three.state_dict()
    fresh = [
        key for key, value in before.items() if not torch.equal(state[key].float(), value.float())
    ]
    assert sorted({key.rpartition(".")[0] for key in fresh}) == ["classifier.1"]


def test_rare_classes_weigh_more_where_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    task = tiny.worker_spec(
        root, tmp_path / "out", tiny.experiment(class_weights="median_frequency")
    )
    counts, seen = np.zeros(4), np.zeros(4)
    for path in sorted((root / "train" / "labels").iterdir()):
        label = np.array(Image.open(path))
        for k in range(4):
            here = int((label == k).sum())
            counts[k] += here
            seen[k] += int((label != 255).sum()) if here else 0
    frequency = counts[:3] / seen[:3]
    assert task.class_weights == pytest.approx([*(np.median(frequency) / frequency), 1.0])


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


def test_a_run_of_a_version_that_had_fewer_fields_goes_on_where_the_new_ones_are_at_their_default(
    root: Path, tmp_path: Path
) -> None:
    def older(experiment: dict[str, Any]) -> None:
        del experiment["optimiser"]["hard_share"], experiment["model"]["dropout"]
        del experiment["seed"], experiment["augment"]["late_crop_size"]

    looked(root, tmp_path / "out", tiny.experiment())
    rewritten(tmp_path / "out" / "run.json", older)
    looked(root, tmp_path / "out", tiny.experiment())
    with pytest.raises(ValueError, match=r"another run \(.*hard_share: 0.5 here, 1.0 there\)"):
        looked(root, tmp_path / "out", tiny.experiment(hard_share=0.5))


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


def test_a_label_of_val_that_was_spoilt_between_two_drivers_is_named_at_once(
    root: Path, tmp_path: Path
) -> None:
    looked(root, tmp_path / "out", tiny.experiment())
    label = root / "val" / "labels" / "01.png"
    Image.new("L", Image.open(label).size, 37).save(label)
    with pytest.raises(SampleError, match="class 37, but num_classes is 4") as error:
        looked(root, tmp_path / "out", tiny.experiment())
    assert error.value.uri == str(label)


def test_a_network_over_the_limit_of_a_create_begins_too(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.settings(root, tmp_path / "out", tiny.experiment())
    looked = inspect_data(settings, print)
    monkeypatch.setattr("pipeline.data.storage.base.MAX_CREATE_BYTES", 100_000)
    begun = prepare(settings, looked, print)
    assert storage.stat_object(begun.spec.initial).size > 100_000  # type: ignore[union-attr]


def test_an_out_that_cannot_be_written_is_refused_before_any_label_is_looked_at(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    with pytest.raises((ValueError, storage.StorageError), match="file"):
        inspect_data(
            tiny.settings(root, tmp_path / "file" / "out", tiny.experiment()), lines.append
        )
    assert not any("checking the labels" in line for line in lines)


def test_what_is_left_counts_late_crops_by_their_size() -> None:
    augment = AugmentConfig(crop_size=(20, 30), late_crop_size=(40, 45), late_from=0.75)
    # six steps of 600 pixels and two of 1,800
    assert augment.steps_like(0, 8) == 6 + 2 * 3
    assert augment.steps_like(5, 8) == 1 + 2 * 3
    assert augment.steps_like(6, 8) == 2
    assert augment.steps_like(8, 8) == 0
    assert replace(augment, late_crop_size=None).steps_like(0, 8) == 8


def test_a_dry_run_for_gpus_where_there_are_none_says_so(root: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = tiny.settings(root, tmp_path / "out", tiny.experiment())
    with pytest.raises(ValueError, match="run it on a machine with one"):
        estimate(replace(settings, gpus_per_worker=1.0), print)


def test_every_row_of_table_11_can_be_run_on_its_replicas() -> None:
    for replicas in (1, 2, 4, 8, 16, 32):
        recipe = by_name(f"table11-replicas{replicas}")
        TrainingSettings(
            data="d", out="o", workers=(replicas,), gpus_per_worker=1.0,
            experiment=recipe.experiment,
        )  # fmt: skip
