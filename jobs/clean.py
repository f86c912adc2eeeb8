"""Deletes a run, or what killed runs left behind: `python jobs/clean.py RESULTS --run-id ID`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.cli.arguments import parse
from pipeline.cli.exit import hard_exit, run_interactive
from pipeline.data import storage
from pipeline.results.layout import check_run_id
from pipeline.runs import cleanup, lease


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to clean, and what."""

    results: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RESULTS")]
    """Where the runs wrote: s3://bucket/prefix or a folder."""

    run_id: str | None = None
    """The run to delete with all that it wrote. Without it only what killed runs left behind and
    nobody needs is deleted: temporary files, leases and single rows of finished runs, and files of
    plans that were not taken."""

    dry_run: bool = False
    """Show what would be deleted, and delete nothing."""

    def __post_init__(self) -> None:
        storage.normalize(self.results)
        if self.run_id is not None:
            check_run_id(self.run_id)


def main(argv: Sequence[str] | None = None) -> int:
    """Deletes and says what; 0, or 1 where it failed, or 2 where the arguments are wrong.

    Who works on the run is told by a lease that changes: one that may be somebody's is watched,
    which is said on stderr.
    """
    return run_interactive(
        lambda: parse(Arguments, argv, description=__doc__),
        _clean,
        expected=(OSError, LookupError, lease.HeldError),
    )


def _clean(arguments: Arguments) -> None:
    results, run_id = arguments.results, arguments.run_id
    found = cleanup.find_run(results, run_id) if run_id else cleanup.find_leftovers(results)
    if not arguments.dry_run:
        cleanup.delete(results, found)
    print("\n".join(_lines(arguments, found)))


def _lines(arguments: Arguments, found: Sequence[storage.Object]) -> list[str]:
    objects: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for item in found:
        folder = cleanup.folder_of(arguments.results, item)
        objects[folder] += 1
        held[folder] += item.size
    lines = [f"{name:<8} {objects[name]:>9,} objects {held[name]:>15,} bytes" for name in objects]
    verb = "would delete" if arguments.dry_run else "deleted"
    what = f"run {arguments.run_id}" if arguments.run_id else "leftovers"
    total = f"{objects.total():,} objects, {held.total():,} bytes"
    return [*lines, f"{verb} {what} below {arguments.results}: {total}"]


if __name__ == "__main__":
    hard_exit(main())
