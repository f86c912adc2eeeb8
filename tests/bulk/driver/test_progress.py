"""Counts, rate, time left and wait fraction, worked by hand with a manual clock."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.worker.summary import ShardSummary


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _shard(images: int, **errors: int) -> ShardSummary:
    return ShardSummary(shard=0, images=images, errors=Counter(errors), bytes_read=10 * images)


def test_nothing_is_known_before_the_first_shard() -> None:
    progress = Progress(images=100, images_before=20, clock=Clock())
    assert (progress.images_done, progress.images_now, progress.seconds) == (20, 0, 0.0)
    assert progress.images_per_second == 0.0
    assert progress.seconds_left is None
    assert progress.wait_fraction is None


def test_values_after_each_shard_are_those_worked_by_hand() -> None:
    clock = Clock()
    progress = Progress(images=100, images_before=20, clock=clock)
    clock.now += 4
    progress.add(_shard(10, truncated=1))
    assert progress.images_per_second == 10 / 4
    assert progress.seconds_left == 70 / (10 / 4)
    clock.now += 1
    progress.add(_shard(20, truncated=2, vanished=1))
    assert (progress.images_done, progress.images_now, progress.seconds) == (50, 30, 5.0)
    assert progress.images_per_second == 30 / 5
    assert progress.seconds_left == pytest.approx(50 / 6)
    assert progress.errors == {"truncated": 3, "vanished": 1}
    assert progress.bytes_read == 300


def test_the_wait_fraction_is_that_of_all_networks_together() -> None:
    progress = Progress(images=100, images_before=0, clock=Clock())
    progress.add(ShardSummary(shard=0, images=1, actor="a", wait_s=0.0, infer_s=6.0))
    assert progress.wait_fraction == 0.0
    progress.add(ShardSummary(shard=1, images=1, actor="b", wait_s=3.0, infer_s=1.0))
    assert (progress.wait_seconds, progress.infer_seconds) == (3.0, 7.0)
    assert progress.wait_fraction == 0.3
    progress.add(ShardSummary(shard=2, images=1, actor="isolated"))  # not measured
    assert progress.wait_fraction == 0.3


def test_the_rate_is_that_of_the_last_minute() -> None:
    clock = Clock()
    progress = Progress(images=1000, images_before=0, clock=clock)
    for _ in range(10):  # ten images a second, and then one
        clock.now += 10
        progress.add(_shard(100))
    for _ in range(7):
        clock.now += 10
        progress.add(_shard(10))
    assert progress.images_per_second == 1.0


def test_shards_that_take_longer_than_a_minute_still_give_a_rate() -> None:
    clock = Clock()
    progress = Progress(images=1000, images_before=0, clock=clock)
    clock.now += 200
    progress.add(_shard(100))
    assert progress.images_per_second == 0.5
    clock.now += 400
    progress.add(_shard(100))
    assert progress.images_per_second == 0.25


def test_a_rate_over_no_time_is_zero() -> None:
    progress = Progress(images=10, images_before=0, clock=Clock())
    progress.add(_shard(5))
    assert (progress.images_per_second, progress.seconds_left) == (0.0, None)


def test_time_left_is_not_negative_if_the_images_before_are_overestimated() -> None:
    clock = Clock()
    progress = Progress(images=100, images_before=50, clock=clock)  # in truth 36
    clock.now += 1
    progress.add(_shard(64))
    assert progress.seconds_left == 0.0
    assert progress.images_done == 100


def test_images_of_shards_in_work_count_and_the_start_up_time_does_not() -> None:
    clock = Clock()
    progress = Progress(images=100, images_before=0, clock=clock)
    clock.now += 20
    progress.refresh()
    assert (progress.images_done, progress.seconds_left) == (0, None)
    progress.images_in_work = lambda: 8
    clock.now += 4
    progress.refresh()
    assert (progress.images_done, progress.images_per_second) == (8, 2.0)
    assert progress.seconds_left == 46.0
    progress.images_in_work = lambda: 0  # the shard's worker crashed
    clock.now += 1
    progress.refresh()
    assert progress.images_per_second >= 0.0
