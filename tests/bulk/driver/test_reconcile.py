"""Abandoned batches are retried while they make progress; in real actors with a stub segmenter."""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.bulk.driver import actor_pool, progress_actor
from pipeline.bulk.driver.actor_pool import BatchLostError, Pool, unpack
from pipeline.bulk.driver.reconcile import Reconciler
from pipeline.bulk.planning import plan
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.settings import BulkSettings
from pipeline.bulk.worker.rows import RowBuilder
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.bulk.worker.shard_worker import ShardWorker, pack
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.data.labels import VOC
from pipeline.runs.ray_connection import RunStoppedError

SHARDS = 7
CUT_OFF = "no route to the bucket"


class _StubSegmenter:
    """Creates shards' files, empty, up to a number per process; then storage refuses everything.

    The numbers are in the file `script`, the processes that have started in the folder beside it.
    """

    def __init__(self, work: WorkerContext, script: Path) -> None:
        processes = script.with_suffix(".processes")
        self._left = json.loads(script.read_text())[len(list(processes.iterdir()))]
        (processes / str(os.getpid())).touch()
        self._layout = work.layout
        self._lock = threading.Lock()

    def segment(
        self, shard: int, images: list[ImageRef], report: Callable[[int], None]
    ) -> ShardSummary:
        with self._lock:
            if not self._left:
                raise storage.StorageError("access", CUT_OFF)
            self._left -= 1
            report(len(images))
            committed = storage.create(self._layout.shard(shard), b"")
            return ShardSummary(shard=shard, images=len(images), committed=committed)


Reconcile = Callable[[list[int]], list[tuple[int, bool]]]


@pytest.fixture
def reconcile(
    tmp_path: Path,
    ray_session: None,
    settings_for: Callable[..., BulkSettings],
    work_for: Callable[..., WorkerContext],
    fill: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Reconcile]:
    """`reconcile(done)`: the batches (shards given, one at a time) if batch n completes done[n].

    All but the last batch are then cut off from storage, which this process is not.
    """
    fill(str(tmp_path), SHARDS)
    settings = settings_for(str(tmp_path), shard_images=1)
    work = work_for(settings)
    made = plan.make(settings, work.layout, settings.identity(model=work.model))
    script = tmp_path / "script.json"
    (tmp_path / "script.processes").mkdir()

    class StubWorker(ShardWorker):
        def __init__(self, work: WorkerContext, board: Any) -> None:
            names = ShardWorker.__init__.__globals__  # in the worker, a copy of the module's
            names["Segmenter"] = lambda work: _StubSegmenter(work, script)
            super().__init__(work, board)

    ray.cloudpickle.register_pickle_by_value(importlib.import_module(__name__))
    monkeypatch.setattr(actor_pool, "ShardWorker", StubWorker)
    batches: list[tuple[int, bool]] = []
    run_batch = actor_pool.run_batch

    def observed(work: WorkerContext, shards: Any, *given: Any, one_at_a_time: bool) -> Any:
        batches.append((len(shards), one_at_a_time))
        return run_batch(work, shards, *given, one_at_a_time=one_at_a_time)

    monkeypatch.setattr(actor_pool, "run_batch", observed)

    def reconcile(done: list[int]) -> list[tuple[int, bool]]:
        script.write_text(json.dumps(done))
        pool = Pool(min_actors=1, max_actors=1, cpus=1, gpus=0)
        rows = RowBuilder(run_id="test", model=work.model, settings=work.settings, classes=VOC)
        counted: list[int] = []
        reconciler = Reconciler(work, pool, rows, lambda summary: counted.append(summary.shard))
        for part in made.parts:
            reconciler.complete(part)
        assert reconciler.images_in_work() == 0
        assert set(counted) <= set(range(SHARDS))
        assert len(counted) == len(set(counted))
        found = list(storage.list_objects(work.layout.images))
        assert len(found) == SHARDS
        return batches

    yield reconcile
    ray.cloudpickle.unregister_pickle_by_value(importlib.import_module(__name__))


@pytest.mark.ray
def test_a_batch_without_progress_is_followed_by_one_shard_at_a_time(
    reconcile: Reconcile,
) -> None:
    assert reconcile([2, 0, 3, 2]) == [(7, False), (5, False), (5, True), (2, True)]


@pytest.mark.ray
def test_shards_that_no_batch_completes_stop_the_run(reconcile: Reconcile) -> None:
    message = f"without completing any shard: a node cannot reach storage: {CUT_OFF}"
    with pytest.raises(RunStoppedError, match=message):
        reconcile([2, 0, 0, 5])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_progress_actor_counts_images_of_unfinished_shards() -> None:
    actor = progress_actor.start_progress_actor()
    for shard, images in ((3, 0), (5, 4), (3, 2)):
        actor.report.remote(shard, images)
    assert ray.get([actor.images.remote(), actor.shards.remote(), actor.reports.remote()]) == [
        6,
        [3, 5],
        3,
    ]
    actor.remove.remote(3)
    actor.remove.remote(7)  # it never reported
    assert ray.get([actor.images.remote(), actor.shards.remote()]) == [4, [5]]


@pytest.fixture
def work(
    tmp_path: Path,
    settings_for: Callable[..., BulkSettings],
    work_for: Callable[..., WorkerContext],
    fill: Callable[[str, int], None],
) -> WorkerContext:
    """The context of a run over three images with labels, whose storage works."""
    fill(str(tmp_path), 3)
    return work_for(settings_for(str(tmp_path)))


def test_a_summary_is_the_same_after_its_way_through_a_row(work: WorkerContext) -> None:
    summary = ShardSummary(shard=3, images=4, bytes_read=5, wait_s=1.5, committed=True, actor="a")
    summary.errors.update(["empty", "empty", "truncated"])
    assert unpack(pack(summary), work) == summary


def test_a_node_that_alone_cannot_reach_storage_loses_its_batch_only(work: WorkerContext) -> None:
    with pytest.raises(BatchLostError, match="a node cannot reach storage: no route"):
        unpack(pack(ShardSummary(shard=0), fatal="no route", cut_off=True), work)
    assert not list(storage.list_objects(work.layout.singles))  # the probe is deleted


def test_a_bug_stops_the_run_although_storage_works(work: WorkerContext) -> None:
    with pytest.raises(RunStoppedError, match="a bug"):
        unpack(pack(ShardSummary(shard=0), fatal="a bug"), work)


@pytest.mark.parametrize("gone", ["images", "labels", "results"])
def test_storage_that_the_driver_cannot_reach_either_stops_the_run(
    work: WorkerContext, tmp_path: Path, gone: str
) -> None:
    if gone == "results":
        (tmp_path / gone).write_bytes(b"a file in place of the folder")
    else:
        (tmp_path / gone).rename(tmp_path / "elsewhere")
        (tmp_path / gone).symlink_to(tmp_path / gone)  # opening it fails with ELOOP
    with pytest.raises(RunStoppedError, match=r"^no route$"):
        unpack(pack(ShardSummary(shard=0), fatal="no route", cut_off=True), work)
