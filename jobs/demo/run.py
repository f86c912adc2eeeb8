"""The whole pipeline in a minute: a bucket of photos goes in, masks and IoU come out.

Starts an S3 server, fills a bucket with photos that may be passed on and labels drawn by hand,
runs `jobs/segment.py`, `jobs/query.py` and `jobs/report.py` as a person would type them, writes
overlays, and stops what it started. Everything lands in `demo-out/`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.demo.photos import photos
from jobs.demo.server import s3_server
from pipeline.data import images, masks, storage
from pipeline.data.labels import VOC
from pipeline.results import query

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OUT = Path("demo-out")
REPORT = "report.html"
CHECKPOINT = HERE / "tfzoo-voc-mobilenetv2.safetensors"

_QUESTION = """
    select regexp_extract(uri, '[^/]+$') as photo, class_name as class,
           round(fraction, 3) as fraction, round(confidence, 3) as confidence, round(iou, 3) as iou
    from classes where fraction > 0.01 order by photo, fraction desc
"""


def main() -> int:
    """Runs the demo; its exit code is that of the first command that fails."""
    with (
        tempfile.TemporaryDirectory(prefix="deeplab-demo-") as folder,
        s3_server(Path(folder), buckets=("photos", "labels", "results")) as variables,
    ):
        os.environ.update(variables)
        for name, data in photos().items():
            storage.write(f"s3://photos/{name}", data)
        for label in sorted((HERE / "labels").glob("*.png")):
            storage.write(f"s3://labels/{label.name}", label.read_bytes())
        print(f"{len(photos())} photos are in s3://photos, their labels in s3://labels\n")
        for command in _commands():
            print("$", " ".join(map(_shown, command)), flush=True)
            done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=False)
            if done.returncode != 0:
                return done.returncode
            print()
        written = _write_overlays()
    print(
        f"Look at {written[0].parent}: each photo beside its mask, in the colours of the classes,"
    )
    print("and a report of the run with the photos, their labels and masks, for a browser")
    for path in [*written, written[0].with_name(REPORT)]:
        print(f"  {path}")
    return 0


def _commands() -> list[list[str]]:
    segment = ["python", "jobs/segment.py", "--images", "s3://photos", "--results", "s3://results"]
    segment += ["--labels", "s3://labels", "--checkpoint", str(CHECKPOINT.relative_to(ROOT))]
    ask = ["python", "jobs/query.py", "s3://results", " ".join(_QUESTION.split())]
    look = ["python", "jobs/report.py", "s3://results", "--out", str(OUT.absolute() / REPORT)]
    return [segment, ask, look]


def _shown(argument: str) -> str:
    """The argument as a person would type it."""
    return f'"{argument}"' if "'" in argument else shlex.quote(argument)


def _write_overlays() -> list[Path]:
    """Writes each photo beside its overlay; the files."""
    OUT.mkdir(exist_ok=True)
    written = []
    rows = query.connect("s3://results").execute("select uri, mask from latest order by uri")
    for uri, mask in rows.fetchall():
        photo = images.decode(storage.read(uri))
        drawn = masks.overlay(photo, masks.decode(mask), VOC)
        path = OUT.absolute() / f"{Path(uri).stem}.png"
        Image.fromarray(np.hstack([photo, drawn])).save(path)
        written.append(path)
    return written


if __name__ == "__main__":
    sys.exit(main())
