"""Soak test: memory of driver, actor and decoder over a long run, and its files and rows.

    python -m tests.scale.soak shards [COUNT]    one tiny image per shard: memory leaked per shard
    python -m tests.scale.soak images [COUNT]    64 images per shard: memory leaked per image

The whole pipeline runs, on Ray, with one actor on one CPU and images of 9 x 7 pixels, so that the
network takes little of the time. A row is printed for every 5 % of the images. Memory must be flat
after the first 10 %: `actor` and `decoder` may grow by GROWTH_MIB, `driver` by DRIVER_KIB_A_SHARD
more per shard, which Ray holds until the batch of shards ends.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from tests.scale.measure import Row, kib_of, print_table

COUNT = 20_000
SHARD_IMAGES = {"shards": 1, "images": 64}
GROWTH_MIB = 64
DRIVER_KIB_A_SHARD = 40
CHECKPOINT = Path(__file__).parents[2] / "jobs/demo/tfzoo-voc-mobilenetv2.safetensors"
COLUMNS = ("done", "minutes", "driver_mib", "actor_mib", "decoder_mib")


def fill(folder: Path, count: int) -> None:
    """Write `count` images, each of a different color."""
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number % 256, number // 256 % 256, 90)).save(path)


class Memory:
    """Samples the memory of this process and its descendants, a row every `every` images."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._next = 0
        self._started = time.monotonic()
        self.rows: list[Row] = []

    def look(self, done: int) -> Row | None:
        """Return a row, or None if none is due."""
        if done < self._next:
            return None
        self._next = (done // self._every + 1) * self._every
        row: Row = {"done": done, "minutes": (time.monotonic() - self._started) / 60}
        row["driver_mib"] = kib_of("VmRSS") / 2**10
        for name, of in (("actor", "ray::MapWorker"), ("decoder", "decoder_process")):
            row[f"{name}_mib"] = max(descendants_kib(of), default=0) / 2**10
        self.rows.append(row)
        return row


def descendants_kib(name: str) -> Iterator[int]:
    """Yield VmRSS of the descendant processes whose command line contains `name`."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            commands[int(folder.name)] = (folder / "cmdline").read_text(errors="replace")
        except OSError:  # it has exited
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    for pid, command in commands.items():
        if name not in command:
            continue
        above = pid
        while above > 1 and above != os.getpid():
            above = parents.get(above, 0)
        if above == os.getpid():
            try:
                yield kib_of("VmRSS", pid)
            except (OSError, StopIteration):
                continue


def soak(folder: Path, kind: str, count: int, tell: Callable[[Row], None]) -> list[Row]:
    """Run the pipeline, and pass each row to `tell`; return the rows."""
    from pipeline.bulk.driver import run
    from pipeline.bulk.driver.progress import Progress
    from pipeline.bulk.planning import plan
    from pipeline.bulk.settings import BulkSettings

    memory = Memory(max(1, count // 20))

    def watch(_: plan.Plan, progress: Progress) -> None:
        if row := memory.look(progress.images_now):
            tell(row)

    settings = BulkSettings(
        images=str(folder / "images"),
        results=str(folder / "results"),
        checkpoint=str(CHECKPOINT),
        run_id="soak",
        shard_images=SHARD_IMAGES[kind],
        cpus_per_actor=1,
    )
    ended = run.run(settings, watch)
    assert ended.outcome is not None
    assert (ended.outcome.ok, ended.outcome.errors) == (count, 0)
    return memory.rows


def check_rows(folder: Path, kind: str, count: int) -> tuple[int, int]:
    """Check that the run has each image once, without the pipeline's code; return its counts."""
    files = list((folder / "results/images/run=soak").glob("*"))
    tables = (pq.read_table(file, columns=["uri"]) for file in files)
    uris = [uri for table in tables for uri in table["uri"].to_pylist()]
    assert len(files) == -(-count // SHARD_IMAGES[kind]), len(files)
    assert len(uris) == len(set(uris)) == count, (len(uris), len(set(uris)))
    return len(files), len(uris)


def check_flat(rows: list[Row], kind: str, count: int) -> dict[str, float]:
    """Return the growth of each process after the first 10 %, in MiB, and check its limits."""
    later = [row for row in rows if row["done"] >= count / 10]
    shards = (later[-1]["done"] - later[0]["done"]) / SHARD_IMAGES[kind]
    allowed = {name: float(GROWTH_MIB) for name in COLUMNS[2:]}
    allowed["driver_mib"] += min(shards, 10_000) * DRIVER_KIB_A_SHARD / 2**10
    grew = {name: max(row[name] for row in later) - later[0][name] for name in allowed}
    assert all(grew[name] <= allowed[name] for name in grew), (grew, allowed)
    return grew


def main() -> None:
    """Run the soak test, and print the table and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=SHARD_IMAGES)
    parser.add_argument("count", type=int, nargs="?", default=COUNT)
    arguments = parser.parse_args()
    kind, count = arguments.kind, arguments.count
    print_table(COLUMNS, ())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder / "images", count)
        rows = soak(folder, kind, count, print_row)
        files, found = check_rows(folder, kind, count)
    print(f"{files} files, {found} rows, no image twice")
    print("growth after the first 10 %, MiB:", check_flat(rows, kind, count))


def print_row(row: Row) -> None:
    """Print the row as Markdown, unbuffered."""
    print("| " + " | ".join(f"{row[name]:.1f}" for name in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
