"""An ordered, bounded look-ahead over a thread pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(
    items: Iterable[T], load: Callable[[T], R], *, threads: int, ahead: int
) -> Generator[R, None, None]:
    """Yield `load(item)` of each item, in order, with up to `ahead` items loaded in advance.

    An error of `load` is raised when its item's turn comes. Closing the generator drops the items
    that have not started and waits for those that have: no thread is left running.
    """
    pool = ThreadPoolExecutor(threads, "prefetch")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(load, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
