"""The resource usage of a run is the sum over its drivers, including those that crashed."""

from __future__ import annotations

import json

import pytest

from pipeline.bulk.driver import usage
from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.driver.usage import ResourceUsage, UsageLog
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.data import storage
from pipeline.results.layout import RunLayout


def _progress(*shards: tuple[str, float, int]) -> Progress:
    """Progress after one image for each (actor, its age in seconds, bytes read)."""
    progress = Progress(images=100, images_before=0)
    for actor, seconds, read in shards:
        progress.add(
            ShardSummary(
                shard=0,
                images=1,
                actor=actor,
                actor_s=seconds,
                bytes_read=read,
                wait_s=0.5,
                infer_s=1.5,
            )
        )
    return progress


def test_an_actor_counts_from_its_start_to_its_last_shard_in_any_order() -> None:
    progress = _progress(("a", 10.0, 1), ("b", 7.0, 1), ("a", 30.0, 1), ("a", 20.0, 1))
    assert progress.actor_seconds == 37.0


def test_a_run_has_used_what_all_its_drivers_have(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(results=prefix, run_id="r")
    first = UsageLog(layout, _progress(("a", 100.0, 5), ("b", 60.0, 7)), gpus=1.0)
    first.save_if_due()
    assert not list(storage.list_objects(prefix))  # it has just started
    monkeypatch.setattr(usage, "SAVE_EVERY_S", 0.0)
    second = UsageLog(layout, _progress(("c", 20.0, 3)), gpus=0.5)
    second.save_if_due()  # and crashes
    first.save()
    first.save()
    UsageLog(layout, _progress(), gpus=1.0).save()  # it had no shard
    assert len(list(storage.list_objects(layout.usage))) == 2
    last = UsageLog(layout, _progress(("d", 2.0, 1)), gpus=2.0)
    last.save()
    assert last.total() == ResourceUsage(
        actor_seconds=182.0, gpu_seconds=174.0, bytes_read=16, wait_seconds=2.0, infer_seconds=6.0
    )
    usage.delete(layout)
    assert not list(storage.list_objects(prefix))


def test_usage_of_a_driver_that_did_not_measure_waiting_still_counts(prefix: str) -> None:
    layout = RunLayout(results=prefix, run_id="r")
    stored = {"actor_seconds": 10.0, "gpu_seconds": 5.0, "bytes_read": 3}
    storage.write(f"{layout.usage}/0123.json", json.dumps(stored).encode())
    total = UsageLog(layout, _progress(("a", 1.0, 1)), gpus=1.0).total()
    assert total == ResourceUsage(
        actor_seconds=11.0, gpu_seconds=6.0, bytes_read=4, wait_seconds=0.5, infer_seconds=1.5
    )


def test_cost_is_gpu_hours_times_the_price_and_unknown_without_a_price() -> None:
    assert ResourceUsage(gpu_seconds=5400.0).cost(2.0) == 3.0
    assert ResourceUsage(gpu_seconds=5400.0).cost(None) is None
