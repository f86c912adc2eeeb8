"""Reference rows of a bulk run: those of a plain loop in this process, on one thread."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import pyarrow.parquet as pq

from pipeline.bulk.planning.listing import Listing
from pipeline.bulk.settings import BulkSettings, Inference, fingerprint
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.data import storage
from pipeline.model.weights import checkpoint_fingerprint
from pipeline.results.layout import RunLayout

_OF_RUN = ("run_id", "shard", "etag")  # columns that depend on the run, not on the image alone


def rows(
    images: str,
    checkpoint: str,
    inference: Inference,
    *,
    include: tuple[str, ...] = BulkSettings.include,
) -> dict[str, dict[str, Any]]:
    """Return the rows of all images below `images` that match `include`, by URI."""
    settings = BulkSettings(
        images=images, results="/nowhere", checkpoint=checkpoint, include=include, run_id="loop"
    )
    identity = settings.identity(model=checkpoint_fingerprint(storage.read(settings.checkpoint)))
    work = WorkerContext(
        layout=RunLayout(results=settings.results, run_id="loop"),
        images=settings.images,
        checkpoint=settings.checkpoint,
        model=str(identity["model"]),
        settings=fingerprint(asdict(inference)),
        inference=inference,
        batch_images=1,
        cpus=1,
        gpu=False,
    )
    with Listing(settings, model=work.model, settings_print="") as listing:
        refs = list(listing.images())
    segmenter = Segmenter(work)
    data, _ = segmenter.rows_of(0, refs)
    segmenter.close()
    return {row["uri"]: row for row in pq.read_table(io.BytesIO(data)).to_pylist()}


def seen(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that depend on the image alone, whatever the run."""
    return {name: value for name, value in row.items() if name not in _OF_RUN}
