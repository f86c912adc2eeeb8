"""Waves that Ray abandons are begun again while they get somewhere, and end the run when not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest
import ray

from pipeline.bulk.driver import actor_pool
from pipeline.bulk.driver.actor_pool import BatchLostError, Pool
from pipeline.bulk.driver.reconcile import Reconciler
from pipeline.bulk.planning import plan
from pipeline.bulk.settings import Settings
from pipeline.bulk.worker.segmenter import WorkerContext
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.runs.ray_connection import RunStoppedError

SHARDS = 7


class _NoRay(Pool):
    def connect(self) -> None:
        pass


@pytest.fixture
def reconciled(
    tmp_path: Any,
    settings_for: Callable[..., Settings],
    work_for: Callable[..., WorkerContext],
    fill: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[list[int]], list[tuple[int, bool]]]:
    """`reconciled(done)`: waves (shards given, one at a time) where wave n does done[n] of them.

    All but the last wave are then abandoned.
    """
    fill(str(tmp_path), SHARDS)
    settings = settings_for(str(tmp_path), shard_images=1)
    work = work_for(settings)
    made = plan.make(settings, work.layout, settings.identity(model=work.model))
    given: list[tuple[int, bool]] = []

    def reconcile(done: list[int]) -> list[tuple[int, bool]]:
        def wave(
            _: WorkerContext, shards: pa.Table, *__: Any, one_at_a_time: bool
        ) -> Iterator[ShardSummary]:
            number = len(given)
            given.append((len(shards), one_at_a_time))
            for shard in shards["shard"].to_pylist()[: done[number]]:
                storage.create(work.layout.shard(shard), b"")
                yield ShardSummary(shard=shard)
            if number + 1 < len(done):
                raise BatchLostError("the actor died")

        monkeypatch.setattr(actor_pool, "run_batch", wave)
        pool = _NoRay(min_actors=1, max_actors=1, cpus=1, gpus=0)
        reconciler = Reconciler(work, pool, None, lambda _: None)  # type: ignore[arg-type]
        monkeypatch.setattr(reconciler, "_board", object())
        for part in made.parts:
            reconciler.complete(part)
        return given

    return reconcile


def test_an_abandoned_wave_is_begun_again_with_what_is_missing(
    reconciled: Callable[[list[int]], list[tuple[int, bool]]],
) -> None:
    assert reconciled([2, 1, 4]) == [(7, False), (5, False), (4, False)]


def test_a_wave_that_gets_nothing_done_is_followed_by_one_in_which_deaths_cost_less(
    reconciled: Callable[[list[int]], list[tuple[int, bool]]],
) -> None:
    assert reconciled([2, 0, 3, 2]) == [(7, False), (5, False), (5, True), (2, True)]


def test_such_waves_that_get_nothing_done_end_the_run(
    reconciled: Callable[[list[int]], list[tuple[int, bool]]],
) -> None:
    with pytest.raises(RunStoppedError, match="processes get no shard done: the actor died"):
        reconciled([2, 0, 0, 5])


@pytest.fixture
def one_row(
    tmp_path: Any,
    settings_for: Callable[..., Settings],
    work_for: Callable[..., WorkerContext],
    fill: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, bool], Any]:
    """`one_row(fatal, cut_off)`: a wave whose one row an actor sent so."""
    fill(str(tmp_path), 3)
    work = work_for(settings_for(str(tmp_path)))

    def wave(fatal: str, cut_off: bool) -> Any:
        row = {**asdict(ShardSummary(shard=0)), "errors": "{}", "fatal": fatal, "cut_off": cut_off}
        monkeypatch.setattr(actor_pool, "StallWatchdog", lambda *_: Mock(watched=lambda _: [row]))
        monkeypatch.setattr("ray.data.from_items", Mock())
        pool = _NoRay(min_actors=1, max_actors=1, cpus=1, gpus=0)
        return list(actor_pool.run_batch(work, pa.table({"shard": [0]}), pool, Mock()))

    wave.work = work  # type: ignore[attr-defined]
    return wave


def test_a_node_that_alone_is_cut_off_from_storage_costs_its_wave_and_not_the_run(
    one_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BatchLostError, match="a node is cut off from storage: no route"):
        one_row("no route", True)
    assert not list(storage.list_objects(one_row.work.layout.singles))
    assert len(one_row("", False)) == 1
    with pytest.raises(RunStoppedError, match="a bug"):
        one_row("a bug", False)


def test_processes_that_ray_kills_for_memory_cost_their_wave_and_not_the_run(
    one_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Any) -> Any:
        raise ray.exceptions.OutOfMemoryError("the node runs out of memory")

    one_row("", False)
    monkeypatch.setattr(actor_pool, "StallWatchdog", lambda *_: Mock(watched=killed))
    pool = _NoRay(min_actors=1, max_actors=1, cpus=1, gpus=0)
    with pytest.raises(BatchLostError, match="runs out of memory"):
        list(actor_pool.run_batch(one_row.work, pa.table({"shard": [0]}), pool, Mock()))


@pytest.mark.parametrize("refused", ["read", "write"])
def test_storage_that_refuses_the_driver_too_ends_the_run(
    one_row: Any, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(uri: str, *_: Any) -> None:
        raise storage.StorageError("access", f"{uri}: denied")

    monkeypatch.setattr(storage, refused, refuse)
    with pytest.raises(RunStoppedError, match=r"^no route$"):
        one_row("no route", True)


def test_labels_that_storage_refuses_the_driver_too_end_the_run(
    one_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = storage.read

    def refuse_labels(uri: str, *given: Any) -> bytes:
        if "/labels/" in uri:
            raise storage.StorageError("access", f"{uri}: denied")
        return read(uri, *given)

    monkeypatch.setattr(storage, "read", refuse_labels)
    with pytest.raises(RunStoppedError, match=r"^no label$"):
        one_row("no label", True)
