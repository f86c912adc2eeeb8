"""Waiting for work on another thread: what it gives, what it raises, and Ctrl-C."""

from __future__ import annotations

import _thread
import threading
import time

import pytest

from jobs.waiting import wait_for


def test_what_the_work_gives_and_raises_comes_through() -> None:
    assert wait_for(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        wait_for(lambda: 1 // 0)


@pytest.mark.parametrize("listens", [True, False])
def test_an_interruption_stops_the_work_or_leaves_it(listens: bool) -> None:
    ended, asked = threading.Event(), []

    def work() -> None:
        _thread.interrupt_main()
        ended.wait(20)

    def stop() -> None:
        asked.append(time.monotonic())
        if listens and len(asked) == 2:
            ended.set()

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait_for(work, stop)
    took = time.monotonic() - started
    ended.set()
    assert took < 0.9 if listens else 0.9 < took < 5
    assert len(asked) == 2 if listens else len(asked) > 5
