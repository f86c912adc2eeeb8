"""Shards whose process died, photo by photo: who kills its process alone, twice, is condemned.

Each photo is the only thing on its actor, so a death names it exactly; a death with its node is
nobody's fault and does not count. A photo's row is kept under `singles/`, outside of what readers
glob, until the shard's one file is made of them: an interrupted shard is not begun again.
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
from pipeline.bulk.planning.listing import Listed
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.results import tables
from pipeline.runs.artifacts import read_artifact
from pipeline.runs.ray_connection import RunStoppedError
from pipeline.text import last_line

MAX_CRASHES = 2
"""Deaths of a process with the photo alone on it that condemn the photo."""

_DIED = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""What Ray says of a process that died; the latter where Ray itself killed it, for memory."""

MAX_ATTEMPTS = 10
"""Processes that are started for one photo at most, those that nodes took with them included."""

IMAGE_TIMEOUT_S = 900.0
"""Seconds for one photo alone, the model's loading included."""

logger = logging.getLogger(__name__)


class IsolatedWorker:
    """The actor: a segmenter that is given one photo at a time."""

    def __init__(self, work: WorkerContext) -> None:
        self._work = work

    def start(self) -> str:
        """Makes the segmenter; the id of the node that this process runs on."""
        self._segmenter = Segmenter(self._work)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def file_of(self, shard: int, photo: Listed) -> bytes:
        """A Parquet file of the photo's row."""
        return self._segmenter.rows_of(shard, [photo])[0]


class ImageIsolator:
    """Segments shards photo by photo, and creates their files."""

    def __init__(self, work: WorkerContext, pool: Pool, rows: RowBuilder) -> None:
        self._work = work
        self._pool = pool
        self._rows = rows
        self._schema = tables.with_footer(tables.IMAGES, rows.classes)
        self._actor: Any = None
        self._node: str | None = None  # None until the actor's segmenter stands
        self._stage = ray.remote(IsolatedWorker).options(
            num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=0, max_task_retries=0
        )

    def close(self) -> None:
        """Ends the actor."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def segment(self, shard: int, photos: Sequence[Listed]) -> ShardSummary:
        """Creates the shard's file of its photos' rows, each segmented alone."""
        started = time.monotonic()
        table = pa.concat_tables(self._single(shard, i, photo) for i, photo in enumerate(photos))
        data = tables.table_to_parquet(table.cast(self._schema))
        summary = ShardSummary(shard=shard, images=len(photos), actor=f"alone with {shard}")
        summary.errors.update(kind for kind in table["error_kind"].to_pylist() if kind)
        summary.committed = storage.create(self._work.layout.shard(shard), data)
        summary.actor_s = time.monotonic() - started
        singles = range(len(photos))
        layout = self._work.layout
        storage.delete([layout.single(shard, i) for i in singles], within=layout.results)
        return summary

    def _single(self, shard: int, position: int, photo: Listed) -> pa.Table:
        """The photo's row, kept until the shard has its file. Raises RunStoppedError."""
        uri = self._work.layout.single(shard, position)
        if storage.exists(uri):
            again = "delete it, and the same command segments the photo again"
            return read_artifact(uri, _table, hint=again)
        data = self._file_of(shard, photo)
        storage.create(uri, data)
        return _table(data)

    def _file_of(self, shard: int, photo: Listed) -> bytes:
        deaths = 0
        for _ in range(MAX_ATTEMPTS):
            try:
                if self._actor is None:
                    self._actor = self._stage.remote(self._work)
                    self._node = self._started(self._actor.start.remote())
                data: bytes = ray.get(
                    self._actor.file_of.remote(shard, photo), timeout=IMAGE_TIMEOUT_S
                )
            except ray.exceptions.GetTimeoutError:
                self.close()
                return self._condemned(
                    shard, photo, "timeout", f"no mask within {IMAGE_TIMEOUT_S:g} s"
                )
            except _DIED as error:
                deaths += self._died_of(photo, error)
                if deaths == MAX_CRASHES:
                    return self._condemned(shard, photo, *_cause(error))
            except ray.exceptions.RayError as error:  # a bug, or a fault of the system
                raise RunStoppedError(last_line(error)) from error
            else:
                return data
        raise RunStoppedError(f"no process lives long enough to segment {photo.uri}")

    def _started(self, starting: Any) -> str:
        """The node on which the actor started; there may be none for it yet."""
        timer = self._pool.stall_timer()
        while not ray.wait([starting], timeout=1.0)[0]:
            timer.check(running=0)
        node: str = ray.get(starting)
        return node

    def _died_of(self, photo: Listed, error: Exception) -> bool:
        """Whether the death was the photo's doing; the next try starts another process."""
        self._actor, node, self._node = None, self._node, None
        if node is None or not _is_alive(node):
            return False
        logger.warning("the process died with %r alone on it: %s", photo.uri, error)
        return True

    def _condemned(self, shard: int, photo: Listed, kind: str, message: str) -> bytes:
        return tables.rows_to_parquet([self._rows.error(shard, photo, kind, message)], self._schema)


def _table(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def _cause(error: Exception) -> tuple[str, str]:
    """The kind of error, and words, of a photo with which the process died so."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        message = f"its process was killed {MAX_CRASHES} times to save the node's memory"
        return "out_of_memory", f"{message}, with nothing else on it"
    return "worker_died", f"its process died {MAX_CRASHES} times with nothing else on it"


def _is_alive(node: str) -> bool:
    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())  # type: ignore[no-untyped-call]
