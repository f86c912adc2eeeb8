"""The whole pipeline in a minute: a bucket of images goes in, masks and IoU come out.

Starts an S3 server, fills a bucket with freely licensed images and another with hand-drawn labels,
runs `jobs/segment.py`, `jobs/query.py` and `jobs/report.py` as a user would type them, writes
overlays to `demo-out/`, and stops the server.
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

from jobs.demo.images import demo_images
from jobs.demo.server import s3_server
from pipeline.data import images, masks, storage
from pipeline.data.labels import VOC
from pipeline.results import query

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OUT = Path("demo-out")
REPORT = "report.html"
CHECKPOINT = HERE / "tfzoo-voc-mobilenetv2.safetensors"

_SQL = """
    select regexp_extract(uri, '[^/]+$') as image, class_name as class,
           round(fraction, 3) as fraction, round(confidence, 3) as confidence, round(iou, 3) as iou
    from classes where fraction > 0.01 order by image, fraction desc
"""


def main() -> int:
    """Run the demo and return the exit code of the first command that fails, or 0."""
    with (
        tempfile.TemporaryDirectory(prefix="deeplab-demo-") as folder,
        s3_server(Path(folder), buckets=("images", "labels", "results")) as variables,
    ):
        os.environ.update(variables)
        for name, data in demo_images().items():
            storage.write(f"s3://images/{name}", data)
        for label in sorted((HERE / "labels").glob("*.png")):
            storage.write(f"s3://labels/{label.name}", label.read_bytes())
        print(f"{len(demo_images())} images are in s3://images, their labels in s3://labels\n")
        for command in _commands():
            print("$", " ".join(map(_quoted, command)), flush=True)
            done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=False)
            if done.returncode != 0:
                return done.returncode
            print()
        written = _write_overlays()
    print(f"{written[0].parent} holds an overlay of each image, in the colors of the classes,")
    print("and a report of the run with images, labels and masks, to open in a browser:")
    for path in [*written, written[0].with_name(REPORT)]:
        print(f"  {path}")
    return 0


def _commands() -> list[list[str]]:
    segment = ["python", "jobs/segment.py", "--images", "s3://images", "--results", "s3://results"]
    segment += ["--labels", "s3://labels", "--checkpoint", str(CHECKPOINT.relative_to(ROOT))]
    query_command = ["python", "jobs/query.py", "s3://results", " ".join(_SQL.split())]
    report = ["python", "jobs/report.py", "s3://results", "--out", str(OUT.absolute() / REPORT)]
    return [segment, query_command, report]


def _quoted(argument: str) -> str:
    """Return the argument as a user would type it."""
    return f'"{argument}"' if "'" in argument else shlex.quote(argument)


def _write_overlays() -> list[Path]:
    """Write each image beside its overlay, and return the paths of the files."""
    OUT.mkdir(exist_ok=True)
    written = []
    rows = query.connect("s3://results").execute("select uri, mask from latest order by uri")
    for uri, mask in rows.fetchall():
        image = images.decode(storage.read(uri))
        overlay = masks.overlay(image, masks.decode(mask), VOC)
        path = OUT.absolute() / f"{Path(uri).stem}.png"
        Image.fromarray(np.hstack([image, overlay])).save(path)
        written.append(path)
    return written


if __name__ == "__main__":
    sys.exit(main())
