"""The output of `make demo`: real classes, IoU against hand-drawn labels, overlays."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.demo.images import IMAGES, demo_images

ROOT = Path(__file__).parents[2]
LABELS = ROOT / "jobs" / "demo" / "labels"


def test_every_image_of_the_demo_has_a_label_of_its_size() -> None:
    for name, data in demo_images().items():
        label = Image.open(LABELS / f"{Path(name).stem}.png")
        assert label.size == Image.open(io.BytesIO(data)).size
        assert set(np.unique(label)) <= {*range(21), 255}


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_the_demo_finds_the_cat_the_person_and_the_motorbike(tmp_path: Path) -> None:
    # a Ray of the demo's own, whatever the other tests run
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.demo.run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    iou = {(row[0], row[1]): float(row[4]) for row in cells if len(row) == 5}
    assert iou["chelsea.png", "cat"] > 0.6
    assert iou["astronaut.png", "person"] > 0.6
    assert iou["motorcycle_left.png", "motorbike"] > 0.6
    overlays = {path.stem for path in (tmp_path / "demo-out").glob("*.png")}
    assert overlays == {Path(name).stem for name in IMAGES}
    report = (tmp_path / "demo-out" / "report.html").read_text()
    assert report.count('<img alt="mask"') == len(IMAGES)
