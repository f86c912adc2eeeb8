"""Work that does not come back to Python for minutes, and Ctrl-C, which is to be felt at once."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Self, TypeVar

T = TypeVar("T")

_GRACE_S = 1.0
_AGAIN_S = 0.05
_LOOK_S = 0.2


class BackgroundCall:
    """A thread that works while this one waits for it; open for as long as there is work."""

    def __init__(self) -> None:
        self._given: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def __enter__(self) -> Self:
        threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given.put(None)

    def wait_for(self, work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
        """What `work` gives, or raises.

        Interrupted, it calls `stop` again and again until the work has ended, for a second at
        most, and raises KeyboardInterrupt: the thread may live on then, until the process is left
        (`exit.hard_exit`).
        """
        done: Future[T] = Future()
        try:
            self._given.put(functools.partial(_do, work, done))
            while not done.done():  # a signal that another thread took wakes nobody here
                with contextlib.suppress(TimeoutError):
                    done.exception(timeout=_LOOK_S)
        except KeyboardInterrupt:
            patience = time.monotonic() + _GRACE_S
            while not done.done() and time.monotonic() < patience:
                stop()  # one alone is lost where a query is between two of its parts
                wait([done], timeout=_AGAIN_S)
            raise
        try:
            return done.result()
        finally:
            del done  # an error holds this frame, and would hold itself

    def _work(self) -> None:
        while (given := self._given.get()) is not None:
            given()
            del given


def _do(work: Callable[[], T], done: Future[T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # it is raised where the work is waited for
        done.set_exception(error)
    finally:
        del work, done
