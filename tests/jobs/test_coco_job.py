"""`jobs/coco.py` as a user runs it: a COCO data set becomes a table that training opens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.coco import main
from pipeline.data import masks, storage
from pipeline.data.datasets import Split, open_split
from pipeline.data.labels import get_classes
from pipeline.train.recipes.registry import by_name as recipe
from tests.data.tiny_coco import coco_files, instances, rectangle
from tests.data.tiny_datasets import put_all

Capture = pytest.CaptureFixture[str]

TRAIN = instances(
    [2, 1, 0],
    [(0, 17, rectangle(0, 0, 5, 2)), (1, 1, rectangle(0, 0, 9, 4)), (2, 13, rectangle(0, 0, 6, 6))],
)
ENOUGH = [(1, 1, rectangle(0, 0, 9, 4))]
VAL = instances([3, 4], [(3, 1, rectangle(1, 1, 2, 2))])


def convert(prefix: str, *more: str) -> int:
    return main(["--data", f"{prefix}/coco", "--out", f"{prefix}/ours", *more])


def opened(prefix: str, split: str) -> Split:
    """The split as the recipe for it opens it."""
    data = recipe("coco-pretraining").experiment.data
    assert (data.train_split, data.val_split) == ("train", "val")
    root, classes = f"{prefix}/ours/pairs.parquet", get_classes(data.classes)
    return open_split(root, split, layout=data.layout, classes=classes)


def names(split: Split) -> list[str]:
    return [pair.image.rpartition("/")[2] for pair in split.pairs]


def test_the_recipe_opens_what_the_job_wrote(prefix: str, capsys: Capture) -> None:
    put_all(f"{prefix}/coco", coco_files(train2017=TRAIN, val2017=VAL))
    assert convert(prefix, "--min-pixels", "10") == 0
    captured = capsys.readouterr()
    assert "coco finished train=2 val=2 left_out=1\n" in captured.out
    assert captured.err.splitlines()[-1].startswith("5 of 5 images (100%)")

    train = opened(prefix, "train")
    assert names(train) == ["000000000000.jpg", "000000000001.jpg"]
    label = masks.decode_label(storage.read(train.pairs[0].label), train.classes, size=(5, 7))
    assert label.tolist() == [[8, 8, 0, 0, 0, 0, 0]] * 5
    assert names(opened(prefix, "val")) == ["000000000003.jpg", "000000000004.jpg"]


def test_an_image_needs_the_given_number_of_pixels(prefix: str, capsys: Capture) -> None:
    put_all(f"{prefix}/coco", coco_files(train2017=TRAIN, val2017=VAL))
    assert convert(prefix, "--min-pixels", "11") == 0
    assert names(opened(prefix, "train")) == ["000000000001.jpg"]
    assert convert(prefix, "--min-pixels", "37") == 2
    reason = capsys.readouterr().out.splitlines()[-1]
    assert "none of the 3 images in train2017 has 37 px of VOC's classes" in reason


def test_a_repeated_command_writes_only_what_is_missing_or_changed(prefix: str) -> None:
    put_all(f"{prefix}/coco", coco_files(train2017=TRAIN, val2017=VAL))
    assert convert(prefix, "--min-pixels", "0") == 0
    ours = f"{prefix}/ours"
    before = {item.uri: item for item in storage.list_objects(ours)}
    contents = {uri: storage.read(uri) for uri in before}
    labels = [f"{ours}/labels/train2017/{number:012d}.png" for number in range(3)]
    storage.delete([f"{ours}/pairs.parquet", labels[1]])
    cat_is_dog = json.loads(json.dumps(TRAIN))
    cat_is_dog["annotations"][0]["category_id"] = 18
    put_all(f"{prefix}/coco", coco_files(train2017=cat_is_dog, val2017=VAL))
    assert convert(prefix, "--min-pixels", "0") == 0

    after = {item.uri: item for item in storage.list_objects(ours)}
    changed = {uri for uri in after if storage.read(uri) != contents[uri]}
    assert changed == {labels[0]}
    assert np.unique(masks.decode(storage.read(labels[0]))).tolist() == [0, 12]
    assert after.keys() == before.keys()
    kept = before.keys() - {f"{ours}/pairs.parquet", labels[0], labels[1]}
    assert {uri: before[uri] for uri in kept} == {uri: after[uri] for uri in kept}


def test_ignored_pixels_do_not_count(prefix: str) -> None:
    both = [(0, 17, rectangle(0, 0, 5, 4)), (0, 1, rectangle(0, 2, 5, 7)), *ENOUGH]
    train = instances([0, 1], both)
    put_all(f"{prefix}/coco", coco_files(train2017=train, val2017=VAL))
    assert convert(prefix, "--min-pixels", "25") == 0
    assert len(opened(prefix, "train")) == 2
    assert convert(prefix, "--min-pixels", "26") == 0  # of 35, 10 are ignored
    assert names(opened(prefix, "train")) == ["000000000001.jpg"]


def test_missing_or_invalid_inputs_are_one_line_and_exit_code_2(
    prefix: str, capsys: Capture
) -> None:
    def error_line() -> str:
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "failed" in line)
        return line

    files = coco_files(train2017=TRAIN, val2017=VAL)
    image = files.pop("train2017/000000000002.jpg")
    put_all(f"{prefix}/coco", files)
    assert convert(prefix) == 2
    assert "1 of 3 images" in (line := error_line())
    assert "the first is 000000000002.jpg" in line

    uri = "annotations/instances_val2017.json"
    put_all(f"{prefix}/coco", {"train2017/000000000002.jpg": image, uri: json.dumps([])})
    assert convert(prefix) == 2
    assert f"{uri}: not a COCO instances_*.json file" in error_line()

    storage.delete([f"{prefix}/coco/{uri}"])
    assert convert(prefix) == 2
    assert f"{uri} does not exist" in error_line()
    assert convert(prefix, "--min-pixels", "-1") == 2
    assert not list(storage.list_objects(f"{prefix}/ours"))


def test_a_storage_failure_is_one_line_and_exit_code_1(tmp_path: Path, capsys: Capture) -> None:
    put_all(str(tmp_path / "coco"), coco_files(train2017=TRAIN, val2017=VAL))
    (tmp_path / "ours").write_text("a file, where a folder should be")
    assert convert(str(tmp_path), "--min-pixels", "0") == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("coco failed exit=1 reason=")
    assert "Traceback" not in captured.err
