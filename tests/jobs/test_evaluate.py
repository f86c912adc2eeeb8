"""`jobs/evaluate.py` as a user runs it: what it prints, and its exit code."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image

from jobs import segment
from jobs.demo.images import demo_images
from jobs.evaluate import main
from pipeline.data import storage
from pipeline.model import optimize, predict, weights

DEMO = Path(__file__).parents[2] / "jobs" / "demo"
CHECKPOINT = str(DEMO / "tfzoo-voc-mobilenetv2.safetensors")


def put_voc(prefix: str, count: int) -> None:
    """Write crops of the cat and its label in VOC's layout, and a split `val` of them."""
    cat = Image.open(io.BytesIO(demo_images()["chelsea.png"])).convert("RGB")
    label = Image.open(DEMO / "labels" / "chelsea.png")
    for i in range(count):
        box = (30 * i, 20 * i, 30 * i + 120, 20 * i + 96)
        for image, name in ((cat, f"JPEGImages/{i}.jpg"), (label, f"SegmentationClass/{i}.png")):
            encoded = io.BytesIO()
            image.crop(box).save(encoded, "JPEG" if name.endswith("jpg") else "PNG")
            storage.write(f"{prefix}/{name}", encoded.getvalue())
    names = "\n".join(map(str, range(count)))
    storage.write(f"{prefix}/ImageSets/Segmentation/val.txt", names.encode())


def arguments(prefix: str, *more: str) -> list[str]:
    return [*("--checkpoint", CHECKPOINT, "--data", prefix, "--cpus-per-worker", "1"), *more]


def facts(out: str) -> dict[str, str]:
    """Key and value of the last line."""
    words = shlex.split(out.splitlines()[-1])
    return dict(word.split("=", 1) for word in words if "=" in word)


def test_the_last_line_and_the_table_equal_counted_pixels(
    prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put_voc(prefix, 2)
    assert main(arguments(prefix, "--over", "cat", "background")) == 0
    out = capsys.readouterr().out
    model = optimize.optimize_for_inference(weights.load(CHECKPOINT)[0])
    both, either, right, labeled = np.zeros(21), np.zeros(21), 0, 0
    for i in range(2):
        image = Image.open(io.BytesIO(storage.read(f"{prefix}/JPEGImages/{i}.jpg")))
        data = storage.read(f"{prefix}/SegmentationClass/{i}.png")
        truth = np.array(Image.open(io.BytesIO(data)))
        mask = predict.segment(model, np.array(image)[None])[0][0].numpy()
        for k in range(21):
            of_mask = (mask == k) & (truth != 255)
            both[k] += (of_mask & (truth == k)).sum()
            either[k] += (of_mask | (truth == k)).sum()
        right += int((mask == truth).sum())
        labeled += int((truth != 255).sum())
    ious = [b / e for b, e in zip(both, either, strict=True) if e]
    printed = facts(out)
    assert printed["images"] == "2"
    assert float(printed["miou"]) == pytest.approx(np.mean(ious), abs=1e-4)
    assert float(printed["pixel_accuracy"]) == pytest.approx(right / labeled, abs=1e-4)
    over = (both[0] / either[0] + both[8] / either[8]) / 2
    assert float(printed["over"]) == pytest.approx(over, abs=1e-4)
    assert float(printed["over_low"]) <= float(printed["over"]) <= float(printed["over_high"])
    found = re.search(r"^cat +([\d.]+)$", out, re.MULTILINE)
    assert found is not None
    assert float(found[1]) == pytest.approx(100 * both[8] / either[8], abs=0.02)
    assert re.search(r"^train +-$", out, re.MULTILINE)


def test_the_table_has_a_row_per_configuration_of_the_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_voc(str(tmp_path), 2)
    assert main(arguments(str(tmp_path), "--table", "--limit", "1", "--scales", "0.5", "1")) == 0
    out = capsys.readouterr().out
    lines = out[out.index("\n%  ") + 1 :].splitlines()
    names = [re.split(r"  +", line)[0] for line in lines[1:5]]
    assert names == ["OS 16", "OS 8", "OS 8 + MS", "OS 8 + MS + flip"]
    assert "1 images (of 2) of val" in out
    printed = facts(out)
    assert main(arguments(str(tmp_path), "--limit", "1", "--scales", "0.5", "1", "--flip")) == 0
    alone = facts(capsys.readouterr().out)
    assert printed["miou_os_8_ms_flip"] == alone["miou"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_workers_and_a_bulk_run_give_the_same_iou(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_voc(str(tmp_path), 5)
    threads = torch.get_num_threads()
    assert main(arguments(str(tmp_path))) == 0
    one = facts(capsys.readouterr().out)
    torch.set_num_threads(threads)
    assert main(arguments(str(tmp_path), "--workers", "2")) == 0
    two = facts(capsys.readouterr().out)
    assert {**two, "seconds": ""} == {**one, "seconds": ""}
    bulk = [
        *("--images", f"{tmp_path}/JPEGImages", "--labels", f"{tmp_path}/SegmentationClass"),
        *("--results", f"{tmp_path}/results", "--checkpoint", CHECKPOINT),
        *("--cpus-per-actor", "1"),
    ]
    assert segment.main(bulk) == 0
    [(miou,)] = duckdb.execute(
        "select avg(c.iou) from (select unnest(class_iou) as c "
        f"from '{tmp_path}/results/runs/*.parquet')"
    ).fetchall()
    assert float(one["miou"]) == pytest.approx(miou, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--layout", "camvid"), "--layout camvid has 11 classes, but"),
        (("--classes", "cityscapes"), "--classes has 19 classes, but"),
        (("--over", "cat", "unicorn"), "--over 'unicorn': the classes are background,"),
        (("--split", "nowhere"), "nowhere"),
        (("--output-stride", "5"), "output_stride"),
        (("--scales", "0"), "--scales 0: give one or more"),
        (("--table", "--flip"), "leave out --flip and --output-stride"),
        (("--workers", "0"), "--workers 0: must be at least 1"),
        (("--workers", "9", "--gpus-per-worker", "1"), "--gpus-per-worker 1 on 9 workers: this"),
    ],
)
def test_invalid_arguments_are_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    reason: str,
) -> None:
    put_voc(str(tmp_path), 1)
    assert main(arguments(str(tmp_path), *more)) == 2
    out = capsys.readouterr().out
    assert out.startswith("evaluate failed exit=2 reason=")
    assert reason in out
    assert out.count("\n") == 1


def test_an_unreadable_image_is_named_and_there_is_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_voc(str(tmp_path), 2)
    storage.write(f"{tmp_path}/JPEGImages/1.jpg", b"this is a letter")
    assert main(arguments(str(tmp_path))) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("evaluate failed exit=1 reason=")
    assert "JPEGImages/1.jpg" in last


@pytest.mark.process
def test_one_process_needs_no_ray() -> None:
    code = "import sys, jobs.evaluate; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DEMO.parents[1])
