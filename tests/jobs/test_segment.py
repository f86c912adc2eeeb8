"""`jobs/segment.py` as a user runs it: what it prints, its exit code, what it leaves."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from PIL import Image

from jobs.demo.images import demo_images
from jobs.segment import main
from pipeline.data import masks, storage
from tests.slowdown import slowdown

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "jobs" / "demo"
CHECKPOINT = str(DEMO / "tfzoo-voc-mobilenetv2.safetensors")


def put_images(prefix: str, count: int) -> None:
    """Write `count` crops of the cat, with the same crops of its label."""
    cat = Image.open(io.BytesIO(demo_images()["chelsea.png"])).convert("RGB")
    label = Image.open(DEMO / "labels" / "chelsea.png")
    for i in range(count):
        box = (3 * i, 2 * i, 3 * i + 160, 2 * i + 120)
        for image, name in ((cat, f"images/{i:03d}.jpg"), (label, f"labels/{i:03d}.png")):
            encoded = io.BytesIO()
            image.crop(box).save(encoded, "JPEG" if name.endswith("jpg") else "PNG")
            storage.write(f"{prefix}/{name}", encoded.getvalue())


def arguments(prefix: str, *more: str) -> list[str]:
    return [
        *("--images", f"{prefix}/images", "--labels", f"{prefix}/labels"),
        *("--results", f"{prefix}/results", "--checkpoint", CHECKPOINT, "--cpus-per-actor", "1"),
        *more,
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_iou_of_a_run_equals_counting_the_pixels_of_masks_and_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(str(tmp_path), 5)
    assert main(arguments(str(tmp_path), "--run-id", "a", "--shard-images", "2")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("segment finished run=a images=5 ok=5 errors=0 label_errors=0 shards=3")
    files = f"{tmp_path}/results/images/run=a/*.parquet"
    rows = duckdb.execute(f"select uri, mask from read_parquet('{files}')").fetchall()
    both = either = 0
    for uri, mask in rows:
        cat = masks.decode(mask) == 8
        truth = np.array(Image.open(tmp_path / "labels" / f"{Path(uri).stem}.png"))
        both += int((cat & (truth == 8)).sum())
        either += int(((cat | (truth == 8)) & (truth != 255)).sum())
    [(iou,)] = duckdb.execute(
        "select c.iou from (select unnest(class_iou) as c "
        f"from '{tmp_path}/results/runs/*.parquet') where c.class_name = 'cat'"
    ).fetchall()
    record = f"'{tmp_path}/results/runs/*.parquet'"
    [used] = duckdb.execute(f"select bytes_read, bytes_written, cost from {record}").fetchall()
    read = [*tmp_path.rglob("images/*"), *tmp_path.rglob("labels/*")]
    folders = [tmp_path / "results" / name for name in ("images", "classes", "done")]
    written = [path for folder in folders for path in folder.rglob("*")]
    sizes = [sum(p.stat().st_size for p in paths if p.is_file()) for paths in (read, written)]
    assert used == (*sizes, None)
    [(alive,)] = duckdb.execute(f"select actor_seconds from {record}").fetchall()
    assert 0 < alive < 600
    assert not (tmp_path / "results" / "usage").exists()
    assert either > 10_000
    assert iou == pytest.approx(both / either, abs=1e-12)


@pytest.mark.process
def test_a_dry_run_describes_the_run_and_writes_nothing(
    prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(prefix, 3)
    storage.write(f"{prefix}/images/notes.txt", b"not an image")
    assert main(arguments(prefix, "--dry-run", "--shard-images", "2")) == 0
    out = capsys.readouterr().out
    assert "3 images" in out
    assert "in 2 shards" in out
    assert "labels: 3 of the images have one" in out
    assert "left out: 1 objects" in out
    assert "  estimate: " in out
    assert "    measured on 3 images (0 errors): " in out
    assert " estimated_seconds=" in out.splitlines()[-1]
    assert not list(storage.list_objects(f"{prefix}/results"))


BAD_USE = {
    "scales of 0": (["--scales", "0"], 2, "--scales 0.0: each must be over 0"),
    "an output stride of 5": (["--output-stride", "5"], 2, "--output-stride 5: take 4, 8"),
    "a run id that is a path": (["--run-id", "../x"], 2, "run id '../x': must be"),
    "no images": (["--images", "{prefix}/none"], 2, "there are no objects under {prefix}/none"),
    "no labels": (["--labels", "{prefix}/none"], 2, "there are no objects under {prefix}/none"),
    "patterns that take none": (
        ["--include", "*.xyz"],
        2,
        "--include matches none of its 2 objects",
    ),
    "a checkpoint that is not one": (["--checkpoint", "{prefix}/images/000.jpg"], 2, "000.jpg"),
    "no checkpoint": (["--checkpoint", "{prefix}/x.pth"], 1, "{prefix}/x.pth does not exist"),
    "results below a file": (["--results", "{prefix}/images/000.jpg/r"], 1, "000.jpg/r"),
    "a GPU that is not there": (["--gpus-per-actor", "512"], 2, "--gpus-per-actor 512"),
    "a part of a second GPU": (["--gpus-per-actor", "1.5"], 2, "--gpus-per-actor 1.5"),
    "one image for a folder": (["--images", "{prefix}/images/000.jpg"], 2, "is an object"),
    "a price of no GPU": (["--price-per-gpu-hour", "2"], 2, "with --gpus-per-actor over 0"),
    "an inventory that is not there": (["--inventory", "{prefix}/i.csv"], 2, "i.csv does not"),
    "an answer to nothing": (["--on-model-change", "new-only"], 2, "without --only-new"),
    "an unknown flag": (["--scale", "1"], 2, "--scale"),
}


@pytest.mark.parametrize("what", BAD_USE)
def test_misuse_is_one_line_and_an_exit_code_and_leaves_nothing(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(str(tmp_path), 2)
    before = sorted(tmp_path.rglob("*"))
    flags, code, message = BAD_USE[what]
    more = [flag.replace("{prefix}", str(tmp_path)) for flag in flags]
    assert main(arguments(str(tmp_path), *more)) == code
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"segment failed exit={code} reason=")
    assert message.replace("{prefix}", str(tmp_path)) in line
    assert sorted(tmp_path.rglob("*")) == before


def test_images_that_share_a_label_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(str(tmp_path), 2)
    (tmp_path / "images" / "001.png").write_bytes((tmp_path / "images" / "001.jpg").read_bytes())
    assert main(arguments(str(tmp_path))) == 2
    printed = capsys.readouterr().out
    assert f"{tmp_path}/images/001.jpg" in printed
    assert f"{tmp_path}/images/001.png" in printed
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").rglob("*.*"))


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (None, None, "bucket no-such-bucket does not exist"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "access denied"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "127.0.0.1:9"),
        ("AWS_ENDPOINT_URL", "SILENT", "no response"),
        ("AWS_PROFILE", "nobody", "profile (nobody) could not be found"),
        ("RAY_ADDRESS", "127.0.0.1:9", "cannot reach Ray at RAY_ADDRESS"),
    ],
)
def test_an_unreadable_bucket_is_one_line_within_half_a_minute(
    s3_environment: dict[str, str],
    s3_prefix: str,
    variable: str | None,
    value: str,
    message: str,
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # it takes connections and never answers
    value = f"http://127.0.0.1:{silent.getsockname()[1]}" if value == "SILENT" else value
    environment = {**os.environ, **s3_environment, **({variable: value} if variable else {})}
    put_images(s3_prefix, 1)
    prefix = s3_prefix if variable == "RAY_ADDRESS" else "s3://no-such-bucket"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "jobs/segment.py", *arguments(prefix)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    silent.close()
    assert not list(storage.list_objects(f"{s3_prefix}/results"))
    assert done.returncode == 1
    [line] = done.stdout.splitlines()
    assert message in line
    assert time.monotonic() - started < 30 * slowdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_gets_sigterm_prints_how_to_resume_and_releases_its_lease(
    tmp_path: Path,
) -> None:
    put_images(str(tmp_path), 60)
    command = [sys.executable, "jobs/segment.py", *arguments(str(tmp_path), "--shard-images", "2")]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list(storage.list_objects(f"{tmp_path}/results/images")):
        assert driver.poll() is None
        time.sleep(0.2)
    driver.send_signal(signal.SIGTERM)
    printed, _ = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert printed.splitlines()[-1].startswith(
        'segment failed exit=1 reason="interrupted; the same'
    )
    assert not list(storage.list_objects(f"{tmp_path}/results/leases"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.s3
def test_the_run_of_a_killed_driver_is_resumed_by_the_same_command(s3_prefix: str) -> None:
    put_images(s3_prefix, 24)
    command = [sys.executable, "-m", "jobs.segment", *arguments(s3_prefix, "--shard-images", "2")]
    images = f"{s3_prefix}/results/images"
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(storage.list_objects(images)):
        assert driver.poll() is None
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    put_images(s3_prefix, 25)  # one more than the plan has, and new etags of the same bytes
    first = {item.uri: item.etag for item in storage.list_objects(images)}
    assert len(first) < 12
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " images=24 ok=24 errors=0 " in done.stdout
    after = {item.uri: item.etag for item in storage.list_objects(images)}
    assert first.items() < after.items()
    assert len(after) == 12
