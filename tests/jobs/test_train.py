"""`jobs/train.py` as a person types it: what it trains, what it prints, what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import re
import secrets
import shlex
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tiny_training import arguments, draw, encoded, keys, put_set

from jobs import evaluate, segment
from jobs.train import main
from pipeline.data import samples, storage
from pipeline.model import predict, weights
from pipeline.train import checkpoints

STEPS = ("--max-steps", "6", "--eval-every", "3", "--checkpoint-every", "2", "--workers", "2")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """torch's threads as they were: a job that looks or times in its own process sets them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Trained:
    """A run that ended, and what it printed."""

    prefix: str
    out: str
    err: str

    def read(self, name: str) -> bytes:
        return storage.read(f"{self.prefix}/out/{name}")


@pytest.fixture(scope="module", params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def trained(
    request: pytest.FixtureRequest, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Six steps on two workers, with data and out on this disk, and both on S3."""
    prefix = str(tmp_path_factory.mktemp("train"))
    if request.param == "s3":
        prefix = f"s3://tests/{secrets.token_hex(4)}"
    put_set(f"{prefix}/set")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments(prefix, *STEPS))
    assert code == 0, out.getvalue() + err.getvalue()
    return Trained(prefix, out.getvalue(), err.getvalue())


def facts(out: str) -> dict[str, str]:
    """Key and value of the last line."""
    words = shlex.split(out.splitlines()[-1])
    return dict(word.split("=", 1) for word in words if "=" in word)


def counted_ious(checkpoint: str, numbers: range) -> list[float | None]:
    """IoU of each class over the drawn photos, from the pixels of masks and labels."""
    model, _ = weights.load(checkpoint)
    both, either = np.zeros(4), np.zeros(4)
    for number in numbers:
        photo, label = draw(number)
        photo = np.array(Image.open(io.BytesIO(encoded(photo, "JPEG"))))
        mask = predict.segment(model, photo[None])[0][0].numpy()
        for k in range(4):
            both[k] += ((mask == k) & (label == k)).sum()
            either[k] += (((mask == k) | (label == k)) & (label != 255)).sum()
    return [b / e if e else None for b, e in zip(both, either, strict=True)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_says_how_it_goes_and_ends_with_its_score(trained: Trained) -> None:
    lines = trained.out.splitlines()
    assert lines[-1].startswith("train finished steps=6 seconds=")
    assert facts(trained.out)["out"] == f"{trained.prefix}/out"
    assert "training 6 steps of 4 photos, on 2 workers" in lines
    assert re.search(r"^never +-$", trained.out, re.MULTILINE)
    assert re.search(r"^mean +\d+\.\d\d$", trained.out, re.MULTILINE)
    progress = (
        r"step \d of 6 \(\d+%\), loss [\d.]+, lr 0\.\d+, [\d.]+ images/s, \d+% waiting for data, "
        r"(\d+ min )?\d+ s left"
    )
    score = r"val after step \d: mIoU [\d.]+% \(best [\d.]+%\), pixel accuracy [\d.]+%"
    ious = r"  (red|green|blue) [\d.]+%(, (green|blue) [\d.]+%)*"
    warning = "WARNING on CPUs each worker normalises by its own photos alone: .*"
    known = "|".join((progress, score, ious, warning))
    said = trained.err.splitlines()
    assert [line for line in said if not re.fullmatch(known, line)] == []
    assert sum(line.startswith("WARNING") for line in said) == 1
    assert sum(line.startswith("val after") for line in said) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_the_record_and_the_last_line_say_what_counting_pixels_says(trained: Trained) -> None:
    record = json.loads(trained.read("record.json"))
    expected = counted_ious(f"{trained.prefix}/out/model.safetensors", range(10, 13))
    assert expected[3] is None
    assert record["last"]["ious"] == pytest.approx(expected, abs=1e-3)
    mean = np.mean([iou for iou in record["last"]["ious"] if iou is not None])
    assert record["last"]["miou"] == pytest.approx(mean)
    assert facts(trained.out)["last_miou"] == f"{mean:.4f}"
    history = checkpoints.latest(f"{trained.prefix}/out").history  # type: ignore[union-attr]
    assert [score.step for score in history.scores] == [3, 6]
    best = max(history.scores, key=lambda score: score.miou)
    assert record["best"] == {"step": best.step, "miou": best.miou, "ious": list(best.ious)}
    assert record["last"]["miou"] == history.scores[-1].miou
    assert record["steps"] == 6
    assert record["experiment"]["optimiser"]["max_steps"] == 6


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_leaves_networks_pictures_curves_and_no_more(trained: Trained) -> None:
    for name in ("model.safetensors", "best.safetensors"):
        model, classes = weights.load(f"{trained.prefix}/out/{name}")
        assert classes.names == ("red", "green", "blue", "never")
        assert model.config.num_classes == 4
    for name in ("curves.png", "samples.png"):
        picture = Image.open(io.BytesIO(trained.read(name)))
        picture.load()
        assert min(picture.size) > 100
    found = keys(f"{trained.prefix}/out")
    states = [name for name in found if name.endswith("state.safetensors")]
    assert sorted(states) == [f"checkpoints/step-{step:08d}/state.safetensors" for step in (4, 6)]
    assert "lease.json" not in found
    [events] = [name for name in found if name.startswith("tensorboard/")]
    tags = {value.tag for event in tensorboard(trained.read(events)) for value in event}
    assert any("loss" in tag for tag in tags)
    assert any("miou" in tag.lower() for tag in tags)


def tensorboard(data: bytes) -> Iterator[list[object]]:
    """The values of each event: a length, its checksum, the event, and its checksum."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield list(Event.FromString(data[12 : 12 + length]).summary.value)
        data = data[16 + length :]


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    before = keys(f"{trained.prefix}/out")
    assert main(arguments(trained.prefix, *STEPS, "--resume")) == 0
    out, err = capsys.readouterr()
    assert f"{trained.prefix}/out was finished before: there is nothing to do" in out
    assert facts(out) == facts(trained.out)
    assert err == ""
    assert keys(f"{trained.prefix}/out") == before


@pytest.mark.ray
@pytest.mark.slow
def test_another_experiment_under_the_same_name_is_refused_by_field(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    before = keys(f"{trained.prefix}/out")
    assert main(arguments(trained.prefix, *STEPS, "--base-lr", "0.02")) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("train failed exit=2 reason=")
    assert "holds another run (experiment.optimiser.base_lr: 0.02 here, 0.01 there)" in line
    assert keys(f"{trained.prefix}/out") == before


@pytest.mark.ray
@pytest.mark.slow
def test_segment_takes_the_network_as_it_is_and_gives_the_iou_of_evaluate(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = f"{trained.prefix}/out/model.safetensors"
    data = f"{trained.prefix}/set"
    bulk = ["--images", f"{data}/val/images", "--labels", f"{data}/val/labels"]
    bulk += ["--results", f"{trained.prefix}/results", "--checkpoint", checkpoint]
    assert segment.main([*bulk, "--run-id", "a", "--cpus-per-actor", "1"]) == 0
    [run] = keys(f"{trained.prefix}/results/runs")
    table = storage.read(f"{trained.prefix}/results/runs/{run}")
    rows = ious_of(table)
    expected = json.loads(trained.read("record.json"))["last"]["ious"]
    assert rows == pytest.approx(
        {k: iou for k, iou in enumerate(expected) if iou is not None}, abs=1e-3
    )
    flags = ["--checkpoint", checkpoint, "--data", data, "--layout", "folders", "--split", "val"]
    capsys.readouterr()
    assert evaluate.main([*flags, "--cpus-per-worker", "1"]) == 0
    out = capsys.readouterr().out
    assert float(facts(out)["miou"]) == pytest.approx(np.mean(list(rows.values())), abs=1e-6)
    for name, iou in zip(("red", "green", "blue"), rows.values(), strict=True):
        said = re.search(rf"^{name} +([\d.]+)$", out, re.MULTILINE)
        assert said is not None
        assert float(said[1]) == pytest.approx(100 * iou, abs=0.0051)


def ious_of(table: bytes) -> dict[int, float]:
    """Class id -> IoU of a bulk run's record."""
    record = pq.read_table(pa.BufferReader(table))  # noqa: F841  # DuckDB sees it by its name
    found = duckdb.execute(
        "select c.class_id, c.iou from (select unnest(class_iou) as c from record) "
        "where c.iou is not null order by 1"
    ).fetchall()
    return dict(found)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_set(f"{tmp_path}/set")
    before = keys(str(tmp_path))
    more = ("--repeat-classes", "blue", "--repeats", "3", "--base-lr", "0.003", "--dry-run")
    assert main(arguments(str(tmp_path), *STEPS, *more)) == 0
    out = capsys.readouterr().out
    assert keys(str(tmp_path)) == before
    assert not (tmp_path / "out").exists()
    assert "recipe camvid-mobilenetv2" in out
    said = dict(re.findall(r"^  ([a-z ]+?)  +(\S.*)$", out, re.MULTILINE))
    assert said["train"] == "train, 6 photos (18 with those of blue repeated)"
    assert said["val"] == "val, 3 photos"
    assert said["steps"] == "6 of 4 photos (1.3 epochs)"
    assert said["lr"].startswith("0.003,")
    assert said["crop"].startswith("33 x 35,")
    assert not re.search(r"[{}\[\]]|None|True|False", out)
    assert max(map(len, out.splitlines())) <= 120
    labels = np.concatenate([draw(number)[1].ravel() for number in range(6)])
    labelled = labels[labels != 255]
    for k, name in enumerate(("red", "green", "blue", "never")):
        share, photos = re.findall(rf"^{name} +([\d.]+) +(\d+)$", out, re.MULTILINE)[0]
        assert float(share) == pytest.approx(100 * (labelled == k).mean(), abs=0.0051)
        assert photos == ("6" if k < 3 else "0")
    assert re.search(r"^about .*: 6 steps of \d+\.\d\d s", out, re.MULTILINE)


def test_a_dry_run_says_how_much_of_a_step_waits_for_photos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_set(f"{tmp_path}/set")
    load = samples.load

    def slow(*how: Any) -> Any:
        time.sleep(0.25)
        return load(*how)

    monkeypatch.setattr(samples, "load", slow)  # no loaders: in this process
    assert main(arguments(str(tmp_path), *STEPS, "--dry-run")) == 0
    found = re.search(r"of (\d+\.\d\d) s \((\d+)% of it waiting", capsys.readouterr().out)
    assert found is not None
    step_s, waiting = float(found[1]), int(found[2]) / 100
    assert 0.49 <= step_s * waiting <= 1.0  # a worker's two photos of a quarter of a second


def test_the_list_names_every_recipe_with_the_papers_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  table1-os8 +75\.18 OS8 ", out, re.MULTILINE)
    for name in ("voc-mobilenetv2", "camvid-mobilenetv2", "camvid-resnet50"):
        assert f"  {name} " in out


def label_37(root: Path) -> None:
    storage.write(f"{root}/set/train/labels/03.png", encoded(np.full((44, 59), 37, np.uint8)))


def label_37_of_val(root: Path) -> None:
    storage.write(f"{root}/set/val/labels/11.png", encoded(np.full((52, 75), 37, np.uint8)))


def label_in_colours(root: Path) -> None:
    storage.write(f"{root}/set/train/labels/03.png", encoded(draw(3)[0]))


def label_of_another_size(root: Path) -> None:
    storage.write(f"{root}/set/train/labels/03.png", encoded(draw(2)[1]))


def label_missing(root: Path) -> None:
    (root / "set/train/labels/03.png").unlink()


def nothing_labelled_in_val(root: Path) -> None:
    for number in range(10, 13):
        ignored = np.full_like(draw(number)[1], 255)
        storage.write(f"{root}/set/val/labels/{number}.png", encoded(ignored))


def letter(root: Path) -> None:
    (root / "letter.pth").write_bytes(b"this is a letter")


BAD_DATA = {
    "a label of a class that is not there": (label_37, "train/labels/03.png: label holds"),
    "such a label in val": (label_37_of_val, "val/labels/11.png: label holds"),
    "a label in unknown colours": (label_in_colours, "train/labels/03.png"),
    "a label of another size": (label_of_another_size, "train/labels/03.png"),
    "a label that is missing": (label_missing, "train/images/03.jpg"),
    "a val without a labelled pixel": (nothing_labelled_in_val, "no pixel of the 3 photos of val"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_data_that_cannot_be_trained_on_is_named_before_anything_is_written(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_set(f"{tmp_path}/set")
    spoil, message = BAD_DATA[what]
    spoil(tmp_path)
    line = refused(tmp_path, capsys, arguments(str(tmp_path)))
    assert message in line


BAD_USE = {
    "an unknown recipe": (["--recipe", "camvid-mobilnet"], "did you mean camvid-mobilenetv2"),
    "a recipe without a name": (["--recipe"], "--recipe: expected one argument"),
    "an unknown flag": (["--learning-rate", "1"], "--learning-rate"),
    "a data folder that is not there": (["--data", "{root}/none"], "nothing is there: check"),
    "an unknown split": (["--train-split", "test"], "split 'test' is not in {root}/set; give one"),
    "another layout": (["--layout", "voc"], "it looks like layout folders"),
    "fewer photos than workers": (["--batch-size", "1", "--workers", "2"], "--batch-size 1"),
    "no workers": (["--workers", "0"], "--workers 0: give a number"),
    "other classes than the network's": (["--num-classes", "3"], "give --num-classes 4"),
    "a class to repeat that is none": (["--repeat-classes", "gold"], "repeat_classes has 'gold'"),
    "a public file that is none": (["--init", "zoo:mobilenet"], "'mobilenet'; known are"),
    "a start from a letter": (["--init", "{root}/letter.pth"], "{root}/letter.pth"),
    "a start from nothing": (["--init", "{root}/none.pth"], "{root}/none.pth does not exist"),
    "a whole bucket for out": (["--out", "s3://tests"], "give a prefix below the bucket"),
    "several GPUs a worker": (["--gpus-per-worker", "2"], "--gpus-per-worker 2: it must be 0 to 1"),
    "GPUs that are not there": (
        ["--gpus-per-worker", "1", "--workers", "64", "--batch-size", "64"],
        "--gpus-per-worker 1 on 64 workers: this machine has",
    ),
}


@pytest.mark.parametrize("what", BAD_USE)
def test_bad_use_is_one_line_an_exit_code_and_nothing_left_behind(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_set(f"{tmp_path}/set", train=2, val=1)
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


def test_what_has_to_be_said_is_asked_for(
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
def test_a_bucket_that_does_not_exist_is_said_within_half_a_minute(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_set(f"{tmp_path}/set", train=2, val=1)
    given = arguments(str(tmp_path))
    given[given.index(flag) + 1] = "s3://no-such-bucket/x"
    line = refused(tmp_path, capsys, given, code=1)
    assert "bucket no-such-bucket does not exist" in line


def refused(
    root: Path, capsys: pytest.CaptureFixture[str], given: list[str], *, code: int | None = None
) -> str:
    """The last line of a job that refuses: soon, without a traceback, and leaving nothing."""
    before, started = keys(str(root)), time.monotonic()
    found = main(given)
    out, err = capsys.readouterr()
    *_, last = out.splitlines()
    assert found in ((1, 2) if code is None else (code,))
    assert last.startswith(f"train failed exit={found} reason=")
    assert err == ""
    assert "Traceback" not in out
    assert keys(str(root)) == before
    assert not (root / "out").exists()
    assert time.monotonic() - started < 30
    return last
