"""Preflight: invalid data is refused before anything starts, and a run starts from one network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import storage
from pipeline.data.samples import SampleError
from pipeline.model import weights
from pipeline.train.driver.preflight import inspect_data, prepare
from tests.train import tiny


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": "camvid"}, "has 11 classes, but the network has 4; give --num-classes 11"),
        ({"classes": "cats"}, "classes 'cats': must be voc"),
        ({"classes": '{"names": 4}'}, "--classes: names of the classes is 4"),
        ({"train_split": "test"}, "test"),
        ({"repeat_classes": ("horse",)}, "--repeat-classes 'horse': not a class"),
        ({"layout": "voc"}, "folders"),
    ],
)
def test_data_settings_that_do_not_fit_are_refused_and_nothing_is_written(
    root: Path, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    experiment = tiny.experiment()
    data = replace(experiment.data, **values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as error:
        tiny.worker_spec(root, tmp_path / "out", replace(experiment, data=data))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_invalid_label_is_named_before_anything_starts(root: Path, tmp_path: Path) -> None:
    label = root / "train" / "labels" / "01.png"
    valid = label.read_bytes()
    size = Image.open(label).size
    for pixels, message in (
        (Image.new("L", size, 37), "class 37, but num_classes is 4; is ignore_index"),
        (Image.new("RGB", size, (1, 2, 3)), "color"),
        (Image.new("L", (5, 7), 1), "its image is"),
    ):
        pixels.save(label)
        with pytest.raises(SampleError, match=message) as error:
            tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
        assert error.value.uri == str(label)
    label.unlink()
    with pytest.raises(ValueError, match="01"):
        tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
    assert not (tmp_path / "out").exists()
    label.write_bytes(valid)
    tiny.worker_spec(root, tmp_path / "out", tiny.experiment())


def test_a_label_of_val_that_was_corrupted_before_a_resume_is_named(
    root: Path, tmp_path: Path
) -> None:
    tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
    label = root / "val" / "labels" / "01.png"
    Image.new("L", Image.open(label).size, 37).save(label)
    with pytest.raises(SampleError, match="class 37, but num_classes is 4") as error:
        tiny.worker_spec(root, tmp_path / "out", tiny.experiment())
    assert error.value.uri == str(label)


def test_an_out_that_is_not_writable_is_refused_before_labels_are_checked(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    settings = tiny.settings(root, tmp_path / "file" / "out", tiny.experiment())
    lines: list[str] = []
    with pytest.raises((ValueError, storage.StorageError), match="file"):
        inspect_data(settings, lines.append)
    assert not any("checking the labels" in line for line in lines)


def test_every_machine_starts_from_the_same_network(root: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        tiny.worker_spec(root, tmp_path / name, tiny.experiment())
    one, other = ((tmp_path / name / "initial.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other


def test_a_checkpoint_with_other_classes_gets_a_new_last_layer_which_is_logged(
    root: Path, tmp_path: Path
) -> None:
    three = tiny.network(replace(tiny.MOBILENET, num_classes=3))
    checkpoint = tmp_path / "three.safetensors"
    classes = tiny.CLASSES.from_dict({"names": ["a", "b", "c"]})
    checkpoint.write_bytes(weights.to_bytes(three, classes))
    experiment = replace(tiny.experiment(), init=str(checkpoint))
    settings, lines = tiny.settings(root, tmp_path / "out", experiment), []
    prepare(settings, inspect_data(settings, lines.append), lines.append)
    message = "has 3 classes instead of 4: its last layer is reinitialized"
    assert any(message in line for line in lines)
    found, _ = weights.load(storage.join(settings.out, "initial.safetensors"))
    state, before = found.state_dict(), three.state_dict()
    changed = [
        key for key, value in before.items() if not torch.equal(state[key].float(), value.float())
    ]
    assert sorted({key.rpartition(".")[0] for key in changed}) == ["classifier.1"]


def test_a_network_over_the_size_limit_of_a_create_can_be_prepared(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.settings(root, tmp_path / "out", tiny.experiment())
    report = inspect_data(settings, print)
    monkeypatch.setattr("pipeline.data.storage.base.MAX_CREATE_BYTES", 100_000)
    run = prepare(settings, report, print)
    assert storage.stat_object(run.spec.initial).size > 100_000  # type: ignore[union-attr]


def test_median_frequency_gives_rare_classes_higher_weights(root: Path, tmp_path: Path) -> None:
    experiment = tiny.experiment(class_weights="median_frequency")
    spec = tiny.worker_spec(root, tmp_path / "out", experiment)
    pixels, labeled = np.zeros(4), np.zeros(4)
    for path in sorted((root / "train" / "labels").iterdir()):
        label = np.array(Image.open(path))
        for k in range(4):
            count = int((label == k).sum())
            pixels[k] += count
            labeled[k] += int((label != 255).sum()) if count else 0
    frequency = pixels[:3] / labeled[:3]
    assert spec.class_weights == pytest.approx([*(np.median(frequency) / frequency), 1.0])
