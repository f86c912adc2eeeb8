"""Benchmark of planning: minutes and peak memory for 100 thousand to 10 million images.

    python -m tests.scale.planning [IMAGES ...]

Each step is a new process with all the imports of a driver; it uses the real storage code and a
stub S3 server (`stub_s3.py`) of made-up images:

    nothing    imports only
    plan       list, sort, cut into shards, write the plan
    labelled   the same with a label for each image
    only_new   the same after an earlier run that processed all but every hundredth image
    resume     resume a run with half of its shards done, batch by batch to the end; nothing is
               segmented: the shard files of a batch appear at once

Afterwards the plans are read without the planner's code and compared with the bucket.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from tests.scale.made_up_bucket import IMAGES, LABELS, made_up
from tests.scale.measure import Row, in_a_process, print_table, taken
from tests.scale.stub_s3 import FILL, stub_s3

SIZES = (100_000, 1_000_000, 10_000_000)
STEPS = ("nothing", "plan", "labelled", "only_new", "resume")
SHARD_IMAGES = 64
NEW_EVERY = 100
"""An earlier run processed all images but those whose number is a multiple of this."""


def results_of(images: int) -> str:
    """Return the results prefix of the runs over this number of images."""
    return f"s3://results/{images}"


def step(name: str, images: int) -> Row:
    """Run the step in this process, and return its time and peak memory."""
    from pipeline.bulk.driver import run  # noqa: F401 - all that a driver imports
    from pipeline.bulk.planning import plan
    from pipeline.bulk.settings import BulkSettings
    from pipeline.results.layout import RunLayout

    settings = BulkSettings(
        images=f"s3://{IMAGES}/{images}",
        labels=f"s3://{LABELS}/{images}" if name == "labelled" else None,
        results=results_of(images),
        checkpoint="/none",
        run_id="plan" if name == "resume" else name,
        only_new=name == "only_new",
        shard_images=SHARD_IMAGES,
    )
    layout = RunLayout(results=settings.results, run_id=settings.run_id or "")
    if name == "nothing":
        return taken(lambda: None)
    if name == "resume":
        return taken(lambda: _resume(layout))
    return taken(lambda: plan.make(settings, layout, settings.identity(model="m")))


def _resume(layout: Any) -> None:
    """Resume the plan of an interrupted run as a driver does, without Ray or the network."""
    from unittest.mock import Mock

    from pipeline.bulk.driver import actor_pool, preflight, reconcile
    from pipeline.bulk.planning import plan
    from pipeline.bulk.worker.summary import ShardSummary

    def appear(_: Any, shards: pa.Table, *__: Any, **___: Any) -> Iterator[ShardSummary]:
        numbers = shards["shard"].to_pylist()
        fill_shards(layout.images, numbers[0], numbers[-1] + 1)
        yield from (ShardSummary(shard=number) for number in numbers)

    actor_pool.run_batch = appear  # type: ignore[assignment]
    known = plan.load(layout)
    assert known is not None
    progress = preflight.build_progress(known, layout)
    work = Mock(layout=layout)
    reconciler = reconcile.Reconciler(work, Mock(max_actors=1), Mock(), progress.add)
    reconciler._progress_actor = Mock()
    for part in known.parts:
        reconciler.complete(part)


def fill_shards(images: str, first: int, stop: int) -> None:
    """Create empty shard files with the numbers `first` to `stop` - 1 below the prefix."""
    url = os.environ["AWS_ENDPOINT_URL"] + "/" + images.removeprefix("s3://")
    urlopen(Request(url, method="PUT", headers={FILL: f"{first} {stop}"})).close()


def put_done(images: int, *, model: str, settings: str, new_every: int = NEW_EVERY) -> None:
    """Write the `done/` file of an earlier run: all images but every `new_every`-th (0: all)."""
    from pipeline.results import tables

    constants = {"model": model, "settings": settings, "status": "ok", "run_id": "earlier"}
    with tempfile.NamedTemporaryFile() as file:
        with pq.ParquetWriter(file.name, tables.DONE, compression="zstd") as writer:
            for first in range(0, images, 100_000):
                rows = []
                for i in range(first, min(images, first + 100_000)):
                    if not new_every or i % new_every:
                        key, etag, _ = made_up(IMAGES, images, i)
                        rows.append({"uri": f"s3://{IMAGES}/{key}", "etag": etag, **constants})
                writer.write_table(pa.Table.from_pylist(rows, schema=tables.DONE))
        _put(f"{results_of(images)}/done/run=earlier.parquet", Path(file.name))


def _put(uri: str, file: Path) -> None:
    url = os.environ["AWS_ENDPOINT_URL"] + "/" + uri.removeprefix("s3://")
    with file.open("rb") as data:
        headers = {"Content-Length": str(file.stat().st_size)}
        urlopen(Request(url, data=data, method="PUT", headers=headers)).close()


def plan_bytes_and_check(images: int, run: str) -> int:
    """Check that the plan holds each image once, in order; return the plan's size in bytes."""
    stub = pafs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    folder = f"{results_of(images).removeprefix('s3://')}/plans/run={run}"
    with stub.open_input_stream(f"{folder}/plan.json") as file:
        names = [part["name"] for part in json.loads(file.read())["parts"]]
    numbers = iter(range(0, images, NEW_EVERY if run == "only_new" else 1))
    shard, held = itertools.count(), 0
    for name in names:
        with stub.open_input_file(f"{folder}/{name}") as file:
            held += file.size()
            for row in pq.read_table(file).to_pylist():
                assert row["shard"] == next(shard)
                for image in row["images"]:
                    _check_image(image, images, next(numbers), labelled=run == "labelled")
    assert next(numbers, None) is None
    return held


def _check_image(image: Row, images: int, number: int, *, labelled: bool) -> None:
    key, etag, size = made_up(IMAGES, images, number)
    found = (image["uri"], image["etag"], image["bytes"])
    assert found == (f"s3://{IMAGES}/{key}", etag, size)
    label_key, *of_label = made_up(LABELS, images, number)
    label = (f"s3://{LABELS}/{label_key}", *of_label) if labelled else (None, None, None)
    assert (image["label_uri"], image["label_etag"], image["label_bytes"]) == label


def shard_files(images: int) -> int:
    """Return the number of files of the resumed run."""
    stub = pafs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    folder = f"{results_of(images).removeprefix('s3://')}/images/run=plan"
    return sum(
        each.is_file for each in stub.get_file_info(pafs.FileSelector(folder, recursive=True))
    )


@contextmanager
def stub_environment() -> Iterator[None]:
    """Start a stub server, and set this process's environment variables to use it."""
    with stub_s3() as variables:
        os.environ.update(variables)
        os.environ.pop("AWS_PROFILE", None)
        yield


def all_steps(images: int, steps: tuple[str, ...] = STEPS) -> Iterator[Row]:
    """Yield a row per step with its time and memory; `resume` needs `plan` before it."""
    from dataclasses import asdict

    from pipeline.bulk.settings import Inference, fingerprint

    if "only_new" in steps:
        put_done(images, model="m", settings=fingerprint(asdict(Inference())))
    shards = -(-images // SHARD_IMAGES)
    for name in steps:
        if name == "resume":
            fill_shards(f"{results_of(images)}/images/run=plan", 0, shards // 2)
        took = in_a_process("tests.scale.planning", "--step", name, str(images))
        row: Row = {"images": images, "step": name, **took}
        if name in ("plan", "labelled", "only_new"):
            row["plan_mib"] = plan_bytes_and_check(images, name) / 2**20
        if name == "resume":
            assert shard_files(images) == shards
        yield row


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=int, nargs="*", default=SIZES)
    parser.add_argument("--step", choices=STEPS, help="run only this step, in this process")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(step(arguments.step, arguments.images[0])))
        return
    columns = ("images", "step", "minutes", "cpu_minutes", "peak_mib", "disk_mib", "plan_mib")
    with stub_environment():
        print_table(
            columns,
            (row for n in arguments.images for row in all_steps(n, tuple(arguments.steps))),
        )


if __name__ == "__main__":
    main()
