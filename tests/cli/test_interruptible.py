"""Waiting for work on another thread: what it gives, what it raises, and Ctrl-C."""

from __future__ import annotations

import _thread
import contextlib
import gc
import threading
import time
import weakref

import pytest

from pipeline.cli import interruptible
from pipeline.cli.interruptible import BackgroundCall


def test_what_the_work_gives_and_raises_comes_through() -> None:
    with BackgroundCall() as beside:
        other = beside.wait_for(threading.get_ident)
        assert other != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            beside.wait_for(lambda: 1 // 0)
        assert beside.wait_for(threading.get_ident) == other


def test_what_failed_work_held_is_let_go_of_with_its_error() -> None:
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)

    def work(what: Held) -> None:
        raise ValueError(repr(what))

    def ask(what: Held) -> None:
        with BackgroundCall() as beside, contextlib.suppress(ValueError):
            beside.wait_for(lambda: work(what))

    gc.disable()
    try:
        ask(held)
        del held
        deadline = time.monotonic() + 30
        while gone() is not None and time.monotonic() < deadline:
            time.sleep(0.01)  # the thread may not have come to let go of it
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("listens", [True, False])
def test_an_interruption_stops_the_work_or_leaves_it(
    listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruptible, "_GRACE_S", 60.0 if listens else 1.0)
    ended, asked = threading.Event(), []

    def work() -> None:
        _thread.interrupt_main()
        ended.wait(60)

    def stop() -> None:
        asked.append(time.monotonic())
        if listens and len(asked) == 2:
            ended.set()

    started = time.monotonic()
    with BackgroundCall() as beside, pytest.raises(KeyboardInterrupt):
        beside.wait_for(work, stop)
    took = time.monotonic() - started
    ended.set()
    assert took < 30 if listens else 0.9 < took < 30
    assert len(asked) == 2 if listens else len(asked) > 5
