"""`jobs/train.py` as a user runs it: what it trains, what it prints, and its dry run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import secrets
import shlex
import struct
import subprocess
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
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from jobs import evaluate, segment, train
from jobs.train import main
from pipeline.cli import training_tables
from pipeline.cli.training_tables import flags
from pipeline.data import samples, storage
from pipeline.model import predict, weights
from pipeline.train.recipes.registry import by_name
from pipeline.train.worker import checkpoints
from tests.tiny_training import arguments, draw_sample, encode, list_etags, write_dataset

STEPS = ("--max-steps", "6", "--eval-every", "3", "--checkpoint-every", "2", "--workers", "2")


@dataclass(frozen=True)
class Trained:
    """A run that ended, and what it printed."""

    prefix: str
    out: str
    err: str

    def read(self, name: str) -> bytes:
        return storage.read(f"{self.prefix}/out/{name}")


@pytest.fixture(scope="module")
def trained(ray_session: None) -> Trained:
    """Six steps on two workers, with the data set and the output on S3."""
    prefix = f"s3://tests/{secrets.token_hex(4)}"
    write_dataset(f"{prefix}/set")
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
    """IoU of each class over the drawn images, from the pixels of masks and labels."""
    model, _ = weights.load(checkpoint)
    both, either = np.zeros(4), np.zeros(4)
    for number in numbers:
        image, label = draw_sample(number)
        image = np.array(Image.open(io.BytesIO(encode(image, "JPEG"))))
        mask = predict.segment(model, image[None])[0][0].numpy()
        for k in range(4):
            both[k] += ((mask == k) & (label == k)).sum()
            either[k] += (((mask == k) | (label == k)) & (label != 255)).sum()
    return [b / e if e else None for b, e in zip(both, either, strict=True)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_logs_its_progress_and_ends_with_its_score(trained: Trained) -> None:
    lines = trained.out.splitlines()
    assert lines[-1].startswith("train finished steps=6 seconds=")
    assert facts(trained.out)["out"] == f"{trained.prefix}/out"
    assert "training 6 steps of 4 images, on 2 workers" in lines
    assert re.search(r"^never +-$", trained.out, re.MULTILINE)
    assert re.search(r"^mean +\d+\.\d\d$", trained.out, re.MULTILINE)
    progress = (
        r"step \d of 6 \(\d+%\), loss [\d.]+, lr 0\.\d+, [\d.]+ images/s, \d+% waiting for data, "
        r"(\d+ min )?\d+ s left"
    )
    score = r"val after step \d: mIoU [\d.]+% \(best [\d.]+%\), pixel accuracy [\d.]+%"
    ious = r"  (red|green|blue) [\d.]+%(, (green|blue) [\d.]+%)*"
    warning = "WARNING on CPUs each worker normalizes by its own images only, so .*"
    known = "|".join((progress, score, ious, warning))
    lines = trained.err.splitlines()
    assert [line for line in lines if not re.fullmatch(known, line)] == []
    assert sum(line.startswith("WARNING") for line in lines) == 1
    assert sum(line.startswith("val after") for line in lines) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_the_record_and_the_last_line_equal_counted_pixels(trained: Trained) -> None:
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
def test_a_run_leaves_networks_plots_and_curves_only(trained: Trained) -> None:
    for name in ("model.safetensors", "best.safetensors"):
        model, classes = weights.load(f"{trained.prefix}/out/{name}")
        assert classes.names == ("red", "green", "blue", "never")
        assert model.config.num_classes == 4
    for name in ("curves.png", "samples.png"):
        picture = Image.open(io.BytesIO(trained.read(name)))
        picture.load()
        assert min(picture.size) > 100
    found = list_etags(f"{trained.prefix}/out")
    states = [name for name in found if name.endswith("state.safetensors")]
    assert sorted(states) == [f"checkpoints/step-{step:08d}/state.safetensors" for step in (4, 6)]
    assert "lease.json" not in found
    [events] = [name for name in found if name.startswith("tensorboard/")]
    tags = {value.tag for event in tensorboard(trained.read(events)) for value in event}  # type: ignore[attr-defined]
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
def test_a_finished_run_reports_it_and_changes_nothing(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list_etags(f"{trained.prefix}/out")
    gone = ("--data", f"{trained.prefix}/gone")  # no longer needed
    assert main(arguments(trained.prefix, *STEPS, "--resume", *gone)) == 0
    out, err = capsys.readouterr()
    assert f"{trained.prefix}/out is already finished; nothing to do" in out
    assert facts(out) == facts(trained.out)
    assert err == ""
    assert list_etags(f"{trained.prefix}/out") == before


@pytest.mark.ray
@pytest.mark.slow
def test_another_experiment_under_the_same_out_is_refused_naming_the_field(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list_etags(f"{trained.prefix}/out")
    assert main(arguments(trained.prefix, *STEPS, "--base-lr", "0.02")) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("train failed exit=2 reason=")
    assert "holds another run (experiment.optimiser.base_lr: 0.02 here, 0.01 there)" in line
    assert list_etags(f"{trained.prefix}/out") == before


@pytest.mark.ray
@pytest.mark.slow
def test_segment_uses_the_network_as_it_is_with_the_iou_of_evaluate(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = f"{trained.prefix}/out/model.safetensors"
    data = f"{trained.prefix}/set"
    bulk = ["--images", f"{data}/val/images", "--labels", f"{data}/val/labels"]
    bulk += ["--results", f"{trained.prefix}/results", "--checkpoint", checkpoint]
    assert segment.main([*bulk, "--run-id", "a", "--cpus-per-actor", "1"]) == 0
    [run] = list_etags(f"{trained.prefix}/results/runs")
    table = storage.read(f"{trained.prefix}/results/runs/{run}")
    rows = ious_of(table)
    expected = json.loads(trained.read("record.json"))["last"]["ious"]
    # evaluated in fp32; on a CPU with bf16, the bulk run's masks differ along borders
    assert rows == pytest.approx(
        {k: iou for k, iou in enumerate(expected) if iou is not None}, abs=0.02
    )
    flags = ["--checkpoint", checkpoint, "--data", data, "--layout", "folders", "--split", "val"]
    capsys.readouterr()
    assert evaluate.main([*flags, "--cpus-per-worker", "1"]) == 0
    out = capsys.readouterr().out
    assert float(facts(out)["miou"]) == pytest.approx(np.mean(list(rows.values())), abs=1e-6)
    for name, iou in zip(("red", "green", "blue"), rows.values(), strict=True):
        match = re.search(rf"^{name} +([\d.]+)$", out, re.MULTILINE)
        assert match is not None
        assert float(match[1]) == pytest.approx(100 * iou, abs=0.0051)


def ious_of(table: bytes) -> dict[int, float]:
    """Class id -> IoU of a bulk run's record."""
    record = pq.read_table(pa.BufferReader(table))  # noqa: F841  # DuckDB sees it by its name
    found = duckdb.execute(
        "select c.class_id, c.iou from (select unnest(class_iou) as c from record) "
        "where c.iou is not null order by 1"
    ).fetchall()
    return dict(found)


def test_a_dry_run_describes_the_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(f"{tmp_path}/set")
    before = list_etags(str(tmp_path))
    more = ("--repeat-classes", "blue", "--repeats", "3", "--base-lr", "0.003", "--dry-run")
    assert main(arguments(str(tmp_path), *STEPS, *more)) == 0
    out = capsys.readouterr().out
    assert list_etags(str(tmp_path)) == before
    assert not (tmp_path / "out").exists()
    assert "recipe camvid-mobilenetv2" in out
    values = dict(re.findall(r"^  ([a-z ]+?)  +(\S.*)$", out, re.MULTILINE))
    assert values["train"] == "train, 6 images (18 with those of blue repeated)"
    assert values["val"] == "val, 3 images"
    assert values["steps"] == "6 of 4 images (1.3 epochs)"
    assert values["lr"].startswith("0.003,")
    assert values["crop"].startswith("33 x 35,")
    assert not re.search(r"[{}\[\]]|None|True|False", out.split("as flags:")[0])
    assert max(map(len, out.splitlines())) <= 120
    labels = np.concatenate([draw_sample(number)[1].ravel() for number in range(6)])
    labeled = labels[labels != 255]
    for k, name in enumerate(("red", "green", "blue", "never")):
        share, images = re.findall(rf"^{name} +([\d.]+) +(\d+)$", out, re.MULTILINE)[0]
        assert float(share) == pytest.approx(100 * (labeled == k).mean(), abs=0.0051)
        assert images == ("6" if k < 3 else "0")
    assert re.search(r"^about .*: 6 steps of \d+\.\d\d s", out, re.MULTILINE)


@pytest.mark.process
def test_the_flags_of_a_dry_run_reproduce_the_experiment_in_a_shell(
    tmp_path: Path,
) -> None:
    named = ("--classes", '{"names": ["a b", "it\'s", "c", "d"]}')
    given = train._settings(by_name("camvid-resnet50"), [*arguments(str(tmp_path), *named)[2:]])
    command = "\n".join(["printf '%s\\0' \\", *training_tables._command(flags(given.experiment))])
    printed = subprocess.run(
        ["sh", "-c", command], capture_output=True, check=True, text=True
    ).stdout
    where = ["--data", f"{tmp_path}/set", "--out", f"{tmp_path}/out"]
    for other in ("table8-small-labels", "table7-test"):
        again = train._settings(by_name(other), [*where, *printed.split("\0")[:-1]])
        assert again.experiment == given.experiment
    assert len(flags(given.experiment)) == len(_leaves(json.loads(given.experiment.to_json())))


def _leaves(values: dict[str, Any]) -> list[Any]:
    """Every value of nested objects that is no object."""
    found: list[Any] = []
    for value in values.values():
        found += _leaves(value) if isinstance(value, dict) else [value]
    return found


def test_a_dry_run_reports_how_much_of_a_step_waits_for_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(f"{tmp_path}/set")
    load, took = samples.load, []

    def slow(*how: Any) -> Any:
        started = time.monotonic()
        time.sleep(0.25)
        sample = load(*how)
        took.append(time.monotonic() - started)
        return sample

    monkeypatch.setattr(samples, "load", slow)  # no loaders: in this process
    assert main(arguments(str(tmp_path), *STEPS, "--dry-run")) == 0
    found = re.search(r"of (\d+\.\d\d) s \((\d+)% of it waiting", capsys.readouterr().out)
    assert found is not None
    step_s, waiting = float(found[1]), int(found[2]) / 100
    # a worker's two images of a quarter of a second, or more on a busy machine; not all four
    assert 0.49 <= step_s * waiting <= 3 * np.mean(took)


def test_the_list_names_every_recipe_with_the_papers_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  table1-os8 +75\.18 OS8 ", out, re.MULTILINE)
    for name in ("voc-mobilenetv2", "camvid-mobilenetv2", "camvid-resnet50"):
        assert f"  {name} " in out
