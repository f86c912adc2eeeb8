"""Isolate images whose worker crashed.

An image that crashes its worker `MAX_CRASHES` times while running alone is recorded as an error.
It is the only work of its actor, so a crash identifies it; a crash together with the node does not
count. The row of each image is kept under `singles/`, which readers do not glob, until the shard's
file is made of them, so that an interrupted shard continues where it stopped.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipeline.bulk.driver.actor_pool import Pool
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.bulk.worker.shard_worker import IsolatedWorker
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.results import tables
from pipeline.runs.artifacts import read_artifact
from pipeline.runs.ray_connection import RunStoppedError
from pipeline.text import last_line

MAX_CRASHES = 2
"""Crashes of a worker with only this image in context, after which the image is an error."""

MAX_ATTEMPTS = 10
"""Workers that are started for one image at most, including those lost with their node."""

IMAGE_TIMEOUT_S = 900.0
"""Seconds for one image, including loading the model."""

_CRASHED = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""Ray's errors for a worker that crashed; the second if Ray killed it to free memory."""

logger = logging.getLogger(__name__)


class ImageIsolator:
    """Segmentation of shards one image at a time, including the creation of their files."""

    def __init__(self, context: WorkerContext, pool: Pool, rows: RowBuilder) -> None:
        self._context = context
        self._pool = pool
        self._rows = rows
        self._schema = tables.with_footer(tables.IMAGES, rows.classes)
        self._worker: Any = None
        self._node: str | None = None  # None until the worker has started
        self._worker_class = ray.remote(IsolatedWorker).options(
            num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=0, max_task_retries=0
        )

    def close(self) -> None:
        """Stop the worker."""
        if self._worker is not None:
            ray.kill(self._worker)
            self._worker = None

    def segment(self, shard: int, images: Sequence[ImageRef]) -> ShardSummary:
        """Create the shard's file from rows of images that were each segmented alone.

        Raises RunStoppedError if no worker can be kept running.
        """
        started = time.monotonic()
        rows = (self._row(shard, i, image) for i, image in enumerate(images))
        table = pa.concat_tables(tables.add_missing_columns(each, self._schema) for each in rows)
        data = tables.table_to_parquet(table)
        summary = ShardSummary(shard=shard, images=len(images), actor=f"isolated shard {shard}")
        summary.errors.update(kind for kind in table["error_kind"].to_pylist() if kind)
        summary.committed = storage.create(self._context.layout.shard(shard), data)
        summary.actor_s = time.monotonic() - started
        layout = self._context.layout
        singles = [layout.single(shard, i) for i in range(len(images))]
        storage.delete(singles, within=layout.results)
        return summary

    def _row(self, shard: int, position: int, image: ImageRef) -> pa.Table:
        """Return the image's row, stored until the shard has its file."""
        uri = self._context.layout.single(shard, position)
        if storage.exists(uri):
            hint = "delete it, and run the same command again to segment the image again"
            return read_artifact(uri, _read_table, hint=hint)
        data = self._segment(shard, image)
        storage.create(uri, data)
        return _read_table(data)

    def _segment(self, shard: int, image: ImageRef) -> bytes:
        """Return a Parquet file of the image's row."""
        crashes = 0
        for _ in range(MAX_ATTEMPTS):
            try:
                if self._worker is None:
                    self._worker = self._worker_class.remote(self._context)
                    self._node = self._wait_for(self._worker.start.remote())
                result = self._worker.segment.remote(shard, image)
                data: bytes = ray.get(result, timeout=IMAGE_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                self.close()
                message = f"no mask within {IMAGE_TIMEOUT_S:g} s"
                return self._error(shard, image, "timeout", message)
            except _CRASHED as error:
                crashes += self._is_crash_of(image, error)
                if crashes == MAX_CRASHES:
                    return self._error(shard, image, *_cause(error))
            except ray.exceptions.RayError as error:  # a bug, or a failure of the system
                raise RunStoppedError(last_line(error)) from error
            else:
                return data
        raise RunStoppedError(
            f"no worker ran long enough to segment {image.uri} in {MAX_ATTEMPTS} attempts; "
            "check the cluster's nodes, and run the same command again"
        )

    def _wait_for(self, started: Any) -> str:
        """Return the node of the worker; the cluster may have to grow for it first."""
        timer = self._pool.stall_timer()
        while not ray.wait([started], timeout=1.0)[0]:
            timer.check(running=0)
        node: str = ray.get(started)
        return node

    def _is_crash_of(self, image: ImageRef, error: Exception) -> bool:
        """Return whether the image caused the crash; the next attempt starts another worker."""
        self._worker, node, self._node = None, self._node, None
        if node is None or not _is_alive(node):
            return False
        logger.warning("a worker crashed with only %r in context: %s", image.uri, error)
        return True

    def _error(self, shard: int, image: ImageRef, kind: str, message: str) -> bytes:
        return tables.rows_to_parquet([self._rows.error(shard, image, kind, message)], self._schema)


def _read_table(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def _cause(error: Exception) -> tuple[str, str]:
    """Return the error kind and message of an image whose worker crashed with `error`."""
    alone = "with no other image in work"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        message = f"its worker was killed {MAX_CRASHES} times to free the node's memory"
        return "out_of_memory", f"{message}, {alone}"
    return "worker_died", f"its worker crashed {MAX_CRASHES} times {alone}"


def _is_alive(node: str) -> bool:
    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())  # type: ignore[no-untyped-call]
