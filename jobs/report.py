"""Draws a run as one HTML file: `python jobs/report.py RESULTS --run-id ID --out report.html`."""

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

MAX_PHOTOS = 500
"""Of a group: their pictures are inside the page."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which run, and where its report goes."""

    results: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RESULTS")]
    """Where the runs wrote: s3://bucket/prefix or a folder."""

    run_id: str | None = None
    """The run, finished or not; without it the one that started last of those that finished and
    had photos."""

    out: str = "report.html"
    """The file to write, s3:// or local; one that is there is replaced."""

    photos: int = 12
    """How many photos to show of each group: picked at random, least sure, furthest from their
    labels. They are read where they lie; 0 shows none."""

    def __post_init__(self) -> None:
        storage.normalize(self.results)
        if os.path.isdir(storage.normalize(self.out)):
            raise ValueError(f"--out is {self.out}, a folder; give a file's name")
        if self.run_id is not None:
            check_run_id(self.run_id)
        if not 0 <= self.photos <= MAX_PHOTOS:
            raise ValueError(f"--photos is {self.photos}; it must be 0 to {MAX_PHOTOS}")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report and says where; 0, or 1 where it failed, or 2 where arguments are wrong."""
    return run_interactive(
        lambda: parse(Arguments, argv, description=__doc__),
        _write,
        expected=(OSError, LookupError, ValueError, duckdb.Error, pa.ArrowException),
        on_signal=files.interrupt_queries,
    )


def _write(arguments: Arguments) -> None:
    run_id = arguments.run_id or report.newest_run(arguments.results)
    data = page.render_html(report.build_report(arguments.results, run_id, images=arguments.photos))
    storage.write(storage.normalize(arguments.out), data)
    print(f"{visible(arguments.out)} shows run {run_id} ({size(len(data))})")


if __name__ == "__main__":
    hard_exit(main())
