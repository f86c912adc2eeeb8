"""Refusals of `jobs/train.py`: in one line, promptly, before anything is written."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from jobs.train import main
from pipeline.data import storage
from tests.slowdown import slowdown
from tests.tiny_training import arguments, draw_sample, encode, list_etags, write_dataset


def label_37(root: Path) -> None:
    storage.write(f"{root}/set/train/labels/03.png", encode(np.full((44, 59), 37, np.uint8)))


def label_37_of_val(root: Path) -> None:
    storage.write(f"{root}/set/val/labels/11.png", encode(np.full((52, 75), 37, np.uint8)))


def label_in_colors(root: Path) -> None:
    storage.write(f"{root}/set/train/labels/03.png", encode(draw_sample(3)[0]))


def label_of_another_size(root: Path) -> None:
    storage.write(f"{root}/set/train/labels/03.png", encode(draw_sample(2)[1]))


def label_missing(root: Path) -> None:
    (root / "set/train/labels/03.png").unlink()


def nothing_labeled_in_val(root: Path) -> None:
    for number in range(10, 13):
        ignored = np.full_like(draw_sample(number)[1], 255)
        storage.write(f"{root}/set/val/labels/{number}.png", encode(ignored))


def letter(root: Path) -> None:
    (root / "letter.pth").write_bytes(b"this is a letter")


BAD_DATA = {
    "a label of a class that is not there": (label_37, "train/labels/03.png: label holds"),
    "a label in val of a class that is not there": (
        label_37_of_val,
        "val/labels/11.png: label holds",
    ),
    "a label in unknown colors": (label_in_colors, "train/labels/03.png"),
    "a label of another size": (label_of_another_size, "train/labels/03.png"),
    "a label that is missing": (label_missing, "train/images/03.jpg"),
    "a val without a labeled pixel": (nothing_labeled_in_val, "no pixel of the 3 images of val"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_unusable_training_data_is_named_before_anything_is_written(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(f"{tmp_path}/set")
    spoil, message = BAD_DATA[what]
    spoil(tmp_path)
    line = refused(tmp_path, capsys, arguments(str(tmp_path)))
    assert message in line


BAD_USE = {
    "an unknown recipe": (["--recipe", "camvid-mobilnet"], "did you mean camvid-mobilenetv2"),
    "a recipe without a name": (["--recipe"], "--recipe: expected one argument"),
    "an unknown flag": (["--learning-rate", "1"], "--learning-rate"),
    "a data folder that is not there": (["--data", "{root}/none"], "nothing is there: check"),
    "an unknown split": (
        ["--train-split", "test"],
        "split 'test' is not in {root}/set; choose",
    ),
    "another layout": (["--layout", "voc"], "it looks like layout folders"),
    "fewer images than workers": (["--batch-size", "1", "--workers", "2"], "--batch-size 1"),
    "no workers": (["--workers", "0"], "--workers 0: give a number"),
    "other classes than the network's": (["--num-classes", "3"], "give --num-classes 4"),
    "an unknown class to repeat": (["--repeat-classes", "gold"], "--repeat-classes 'gold'"),
    "an unknown public file": (["--init", "zoo:mobilenet"], "'mobilenet'; known are"),
    "a start from a letter": (["--init", "{root}/letter.pth"], "{root}/letter.pth"),
    "a start from nothing": (["--init", "{root}/none.pth"], "{root}/none.pth does not exist"),
    "a whole bucket for out": (["--out", "s3://tests"], "must be a prefix below the bucket"),
    "a scale without end": (["--eval-scales", "inf"], "--eval-scales inf: give one or more"),
    "a decay that grows": (
        ["--weight-decay", "-1"],
        "--weight-decay -1: must be at least 0 and finite",
    ),
    "a cache of less than nothing": (["--cache-gb", "-1"], "--cache-gb -1: must be at least 0"),
    "several GPUs a worker": (
        ["--gpus-per-worker", "2"],
        "--gpus-per-worker 2: must be from 0 to 1",
    ),
    "GPUs that are not there": (
        ["--gpus-per-worker", "1", "--workers", "64", "--batch-size", "64"],
        "--gpus-per-worker 1 on 64 workers: this machine has",
    ),
}


@pytest.mark.parametrize("what", BAD_USE)
def test_misuse_is_one_line_and_an_exit_code_and_leaves_nothing(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(f"{tmp_path}/set", train=2, val=1)
    letter(tmp_path)
    flags, message = BAD_USE[what]
    more = [flag.replace("{root}", str(tmp_path)) for flag in flags]
    given = arguments(str(tmp_path))
    for flag in ("--recipe", "--data", "--out"):
        if flag in more:
            at = given.index(flag)
            del given[at : at + 2]
    line = refused(tmp_path, capsys, [*given, *more])
    assert message.replace("{root}", str(tmp_path)) in line


def test_an_unknown_class_to_repeat_is_refused_before_labels_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(f"{tmp_path}/set", train=2, val=1)
    assert main([*arguments(str(tmp_path)), "--repeat-classes", "gold"]) == 2
    printed = capsys.readouterr().out
    assert "--repeat-classes 'gold'" in printed
    assert "or leave it empty" in printed
    assert "checking the labels" not in printed


def test_missing_required_flags_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "missing: --recipe; --list prints" in refused(tmp_path, capsys, [])
    recipe = ["--recipe", "camvid-mobilenetv2"]
    assert "missing: --data, --out" in refused(tmp_path, capsys, recipe)
    two_stages = ["--recipe", "table7-test", "--data", "d", "--out", f"{tmp_path}/out"]
    assert "give --init, for example" in refused(tmp_path, capsys, two_stages)


@pytest.mark.s3
@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize("flag", ["--data", "--out"])
def test_a_missing_bucket_is_reported_within_half_a_minute(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(f"{tmp_path}/set", train=2, val=1)
    given = arguments(str(tmp_path))
    given[given.index(flag) + 1] = "s3://no-such-bucket/x"
    line = refused(tmp_path, capsys, given, code=1)
    assert "bucket no-such-bucket does not exist" in line


def refused(
    root: Path, capsys: pytest.CaptureFixture[str], given: list[str], *, code: int | None = None
) -> str:
    """The last line of a job that refuses: soon, without a traceback, and leaving nothing."""
    before, started = list_etags(str(root)), time.monotonic()
    found = main(given)
    out, err = capsys.readouterr()
    *_, last = out.splitlines()
    assert found in ((1, 2) if code is None else (code,))
    assert last.startswith(f"train failed exit={found} reason=")
    assert err == ""
    assert "Traceback" not in out
    assert list_etags(str(root)) == before
    assert not (root / "out").exists()
    assert time.monotonic() - started < 30 * slowdown()
    return last
