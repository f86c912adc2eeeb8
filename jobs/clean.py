"""Delete a run, or the leftovers of crashed runs: `python jobs/clean.py RESULTS --run-id ID`."""

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
class CleanArguments:
    """The results to clean up, and the run to delete."""

    results: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RESULTS")]
    """Results of bulk runs: s3://bucket/prefix or a folder."""

    run_id: str | None = None
    """Run to delete, with everything it wrote. Without it only the leftovers of crashed runs are
    deleted: temporary files, leases and single rows of finished runs, and files of unused plans."""

    dry_run: bool = False
    """Print what would be deleted, without deleting it."""

    def __post_init__(self) -> None:
        storage.normalize(self.results)
        if self.run_id is not None:
            check_run_id(self.run_id)


def main(argv: Sequence[str] | None = None) -> int:
    """Delete, print what was deleted, and return the exit code: 0, 1 or 2.

    A run in use is recognized by the heartbeat in its lease: a lease whose holder may be alive is
    watched for a while first, which is logged.
    """
    return run_interactive(
        lambda: parse(CleanArguments, argv, description=__doc__),
        _clean,
        expected=(OSError, LookupError, lease.HeldError),
    )


def _clean(arguments: CleanArguments) -> None:
    results, run_id = arguments.results, arguments.run_id
    found = cleanup.find_run(results, run_id) if run_id else cleanup.find_leftovers(results)
    if not arguments.dry_run:
        cleanup.delete(results, found)
    print("\n".join(_lines(arguments, found)))


def _lines(arguments: CleanArguments, found: Sequence[storage.Object]) -> list[str]:
    objects: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for item in found:
        folder = cleanup.folder_of(arguments.results, item)
        objects[folder] += 1
        sizes[folder] += item.size
    lines = [f"{name:<8} {objects[name]:>9,} objects {sizes[name]:>15,} bytes" for name in objects]
    verb = "would delete" if arguments.dry_run else "deleted"
    what = f"run {arguments.run_id}" if arguments.run_id else "leftovers"
    total = f"{objects.total():,} objects, {sizes.total():,} bytes"
    return [*lines, f"{verb} {what} below {arguments.results}: {total}"]


if __name__ == "__main__":
    hard_exit(main())
