"""Convert COCO's annotations to labels of VOC's classes, for `jobs/train.py`.

    python jobs/coco.py --data s3://sets/coco --out s3://sets/coco-voc

Writes labels/ and pairs.parquet under --out; pass that table to train as --data. Exits 0 when both
are complete, 1 when storage failed (the same command resumes), 2 on invalid arguments. After a
change of the annotations the same command rewrites the labels that they affect.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.checks import check_at_least
from pipeline.cli.arguments import parse
from pipeline.cli.exit import hard_exit, last_line, print_line, run_job
from pipeline.cli.progress import Display
from pipeline.cli.sanitize import visible
from pipeline.data import coco_labels, storage


@dataclass(frozen=True, kw_only=True)
class CocoArguments:
    """The COCO data set, the output, and the images to keep."""

    data: str
    """COCO's folder, s3:// or local: train2017/ and val2017/ with the images, annotations/ with
    instances_train2017.json and instances_val2017.json."""

    out: str
    """Prefix or folder for labels/ and pairs.parquet, s3:// or local."""

    min_pixels: int = 1000
    """Leave out images of train2017 with fewer pixels of VOC's classes; 1000 in the paper."""

    def __post_init__(self) -> None:
        for uri in (self.data, self.out):
            storage.normalize(uri)
        check_at_least("--min-pixels", self.min_pixels, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with the command line `argv` and return its exit code."""
    return run_job(
        "coco",
        lambda: _draw(parse(CocoArguments, argv, description=__doc__)),
        expected=(OSError,),
        interrupted="interrupted; the same command resumes",
    )


def _draw(arguments: CocoArguments) -> str:
    data, out = storage.normalize(arguments.data), storage.normalize(arguments.out)
    print_line(f"reading the annotations of {visible(data)}")
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
    print_line(f"train with: --recipe coco-pretraining --data {visible(shlex.quote(table))}")
    facts = {split: each.kept for split, each in drawn.items()}
    return last_line("coco finished", facts | {"left_out": drawn["train"].left_out})


if __name__ == "__main__":
    hard_exit(main())
