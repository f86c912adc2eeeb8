"""Write the report of a run as an HTML file: `python jobs/report.py RESULTS --run-id ID`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import duckdb
import pyarrow as pa
import tyro

from pipeline.cli.arguments import parse
from pipeline.cli.exit import hard_exit, run_interactive
from pipeline.cli.progress import size
from pipeline.cli.sanitize import visible
from pipeline.data import storage
from pipeline.results import files, page, report
from pipeline.results.layout import check_run_id

MAX_IMAGES = 500
"""Largest number of images of a group: they are embedded in the page."""


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """The run to report on, and the file to write."""

    results: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RESULTS")]
    """Results of bulk runs: s3://bucket/prefix or a folder."""

    run_id: str | None = None
    """Run to report on, finished or not; by default the finished run with images that started
    last."""

    out: str = "report.html"
    """File to write, s3:// or local; an existing file is replaced."""

    images: int = 12
    """Number of images to show in each group: random ones, those of lowest confidence, those of
    lowest pixel accuracy. They are read from their bucket or folder; 0 shows none."""

    def __post_init__(self) -> None:
        storage.normalize(self.results)
        if os.path.isdir(storage.normalize(self.out)):
            raise ValueError(f"--out {self.out}: is a folder; give a file name")
        if self.run_id is not None:
            check_run_id(self.run_id)
        if not 0 <= self.images <= MAX_IMAGES:
            raise ValueError(f"--images {self.images}: must be from 0 to {MAX_IMAGES}")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, print its path, and return the exit code: 0, 1 or 2."""
    return run_interactive(
        lambda: parse(ReportArguments, argv, description=__doc__),
        _write,
        expected=(OSError, LookupError, ValueError, duckdb.Error, pa.ArrowException),
        on_signal=files.interrupt_queries,
    )


def _write(arguments: ReportArguments) -> None:
    run_id = arguments.run_id or report.newest_run(arguments.results)
    data = page.render_html(report.build_report(arguments.results, run_id, images=arguments.images))
    storage.write(storage.normalize(arguments.out), data)
    print(f"{visible(arguments.out)} shows run {run_id} ({size(len(data))})")


if __name__ == "__main__":
    hard_exit(main())
