"""Waits for work that does not come back to Python for minutes, so that Ctrl-C is felt at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

_GRACE_S = 1.0
_AGAIN_S = 0.05


def wait_for(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """What `work` gives, or raises, in a thread of its own.

    Interrupted, it calls `stop` again and again until the work has ended, for a second at most,
    and raises KeyboardInterrupt: the thread may live on then, until the process is left
    (`ending.leave`).
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # it is raised where the work is waited for
            done.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
        wait([done])
    except KeyboardInterrupt:
        patience = time.monotonic() + _GRACE_S
        while not done.done() and time.monotonic() < patience:
            stop()  # one alone is lost where a query is between two of its parts
            wait([done], timeout=_AGAIN_S)
        raise
    return done.result()
