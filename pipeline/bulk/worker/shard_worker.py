"""The actors of a bulk run: a segmenter each, which processes shards or isolated images."""

from __future__ import annotations

import json
import secrets
import time
import traceback
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import ray

from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.worker.failure_streaks import CutOffError, SystemicError
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data.storage import StorageError

_REPORT_EVERY_S = 2.0


def images_of(images: list[dict[str, Any]]) -> list[ImageRef]:
    """Return the images in a plan row's list."""
    return [ImageRef(**image) for image in images]


class ProgressReporter:
    """Progress reports of one shard, at most every `_REPORT_EVERY_S`."""

    def __init__(self, progress_actor: Any, shard: int) -> None:
        self._progress_actor = progress_actor
        self._shard = shard
        self._next = time.monotonic() + _REPORT_EVERY_S

    def __call__(self, images: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _REPORT_EVERY_S
            self._progress_actor.report.remote(self._shard, images)


class ShardWorker:
    """The actor: a segmenter whose failures become part of its summaries. It raises nothing."""

    def __init__(self, context: WorkerContext, progress_actor: Any) -> None:
        self._progress_actor = progress_actor
        self._name, self._started = secrets.token_hex(8), time.monotonic()
        self._fatal: str | None = None
        self._cut_off = False
        try:
            self._segmenter = Segmenter(context)
        except (SystemicError, StorageError, ValueError) as error:
            self._fatal = f"cannot start the segmenter: {error}"
            self._cut_off = isinstance(error, StorageError)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Segment the one shard in `batch`, and return its summary as a row."""
        [row] = batch.to_pylist()
        return pa.Table.from_pylist([self._segment(row["shard"], images_of(row["images"]))])

    def _segment(self, shard: int, images: list[ImageRef]) -> dict[str, Any]:
        summary, fatal, cut_off = ShardSummary(shard=shard), self._fatal, self._cut_off
        if fatal is None:
            self._progress_actor.report.remote(shard, 0)
            try:
                report = ProgressReporter(self._progress_actor, shard)
                summary = self._segmenter.segment(shard, images, report)
            except (SystemicError, StorageError) as error:
                fatal, cut_off = str(error), isinstance(error, CutOffError | StorageError)
            except Exception as error:  # a bug: the driver logs it and stops the run
                fatal = f"a bug, {type(error).__name__}: {error}\n{traceback.format_exc()}"
        summary.actor, summary.actor_s = self._name, time.monotonic() - self._started
        return pack(summary, fatal=fatal or "", cut_off=cut_off)


def pack(summary: ShardSummary, *, fatal: str = "", cut_off: bool = False) -> dict[str, Any]:
    """Return a summary as a row of scalars; `fatal` is an error that the driver handles.

    `cut_off` is True if the cause may be that this process alone cannot reach storage.
    """
    values = asdict(replace(summary, errors=Counter()))
    return {**values, "errors": json.dumps(summary.errors), "fatal": fatal, "cut_off": cut_off}


class IsolatedWorker:
    """The actor: a segmenter that processes one image at a time."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def start(self) -> str:
        """Load the model, and return the id of this process's node."""
        self._segmenter = Segmenter(self._context)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def segment(self, shard: int, image: ImageRef) -> bytes:
        """Return a Parquet file of the image's row."""
        return self._segmenter.rows_of(shard, [image])[0]
