"""Prefetching: order, the bound, errors, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from pipeline.data.prefetch import prefetch


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_results_come_in_order_however_long_each_takes(ahead: int) -> None:
    def load(item: int) -> int:
        time.sleep(0.01 * (item % 3))
        return item * item

    found = list(prefetch(range(12), load, threads=4, ahead=ahead))
    assert found == [item * item for item in range(12)]


def test_at_most_the_given_number_of_items_is_loaded_in_advance() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    for number, item in enumerate(prefetch(items(), lambda item: item, threads=8, ahead=3)):
        assert item == number
        assert len(taken) == min(20, number + 1 + 3)


def test_the_next_items_are_loaded_while_one_is_in_use() -> None:
    third = threading.Event()

    def load(item: int) -> int:
        if item == 2:
            third.set()
        return item

    with closing(prefetch(range(9), load, threads=1, ahead=2)) as loaded:
        assert next(loaded) == 0
        assert third.wait(10)


def test_an_error_is_raised_at_the_turn_of_its_item_and_leaves_no_thread() -> None:
    def load(item: int) -> float:
        return 1 / (item - 2)

    before, found = threading.active_count(), []
    with pytest.raises(ZeroDivisionError):
        found.extend(prefetch(range(9), load, threads=4, ahead=8))
    assert found == [-0.5, -1.0]
    assert threading.active_count() == before


def test_closing_drops_items_that_have_not_started_and_leaves_no_thread() -> None:
    started: list[int] = []

    def load(item: int) -> int:
        started.append(item)
        time.sleep(0.05)
        return item

    before = threading.active_count()
    with closing(prefetch(range(100), load, threads=2, ahead=50)) as loaded:
        assert next(loaded) == 0
    assert len(started) < 50
    assert threading.active_count() == before
