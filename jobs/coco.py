"""Draws COCO's annotations as labels of VOC's classes, which `jobs/train.py` takes.

    python jobs/coco.py --data s3://sets/coco --out s3://sets/coco-voc

Writes labels/ and pairs.parquet below --out; give the table as --data to train. Exits 0 when both
are there, 1 when storage failed (the same command goes on), 2 on arguments that cannot be right.
The same command after a change of the annotations changes the labels that it concerns.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.cli.arguments import parse
from pipeline.cli.exit import hard_exit, last_line, run_job
from pipeline.cli.progress import Display
from pipeline.cli.sanitize import visible
from pipeline.data import coco_labels, storage


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where COCO is, where the labels go, and which photos are worth training on."""

    data: str
    """COCO's folder, s3:// or local: train2017/ and val2017/ with the photos, annotations/ with
    instances_train2017.json and instances_val2017.json."""

    out: str
    """Where labels/ and pairs.parquet go, s3:// or a folder."""

    min_pixels: int = 1000
    """Photos of train2017 with fewer pixels of VOC's classes are left out: the paper's 1000."""

    def __post_init__(self) -> None:
        for uri in (self.data, self.out):
            storage.normalize(uri)
        if self.min_pixels < 0:
            raise ValueError(f"--min-pixels is {self.min_pixels}; it must be at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job with the command line `argv`; its exit code."""
    return run_job(
        "coco",
        lambda: _draw(parse(Arguments, argv, description=__doc__)),
        expected=(OSError,),
        interrupted="interrupted; the same command goes on",
    )


def _draw(arguments: Arguments) -> str:
    data, out = storage.normalize(arguments.data), storage.normalize(arguments.out)
    print(f"reading the annotations of {visible(data)}", flush=True)
    pictures = coco_labels.read_annotations(data)
    progress = Progress(images=sum(map(len, pictures.values())), images_before=0)
    with Display(count_errors=False) as display:

        def tell(images: int) -> None:
            progress.add(ShardSummary(shard=0, images=images))
            display(progress)

        drawn = coco_labels.convert(
            pictures, data, out, min_pixels=arguments.min_pixels, progress=tell
        )
    table = storage.join(out, coco_labels.TABLE)
    print(f"train with: --recipe coco-pretraining --data {visible(shlex.quote(table))}")
    facts = {split: each.kept for split, each in drawn.items()}
    return last_line("coco finished", facts | {"left_out": drawn["train"].left_out})


if __name__ == "__main__":
    hard_exit(main())
