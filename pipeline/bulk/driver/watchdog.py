"""Who watches a wave: a board that shards report to, and a dog that looks whether one gets on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipeline.runs.timeouts import StallTimer

_LOOK_EVERY_S = 1.0
_BOARD_TIMEOUT_S = 5.0


class StallWatchdog:
    """Looks whether a wave gets on, between the steps of its execution."""

    _ours: StallWatchdog | None = None  # whose wave begins

    def __init__(self, stall_timer: Callable[[Callable[[], str]], StallTimer], board: Any) -> None:
        self._board = board
        self._stall_timer = stall_timer(self._shards_in_work)
        self._next = 0.0
        self._asked: Any = None
        self._told = self._done = 0

    def watched(self, summaries: Any) -> Iterator[dict[str, Any]]:
        """The data set's rows; raises RunStoppedError where none comes for too long."""
        StallWatchdog._ours = self
        for row in summaries.iter_rows():
            self._done += 1
            yield row

    def look(self, executor: Any) -> None:
        """Is called by Ray Data's own loop, many times a second; what it raises ends the wave."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOOK_EVERY_S
            self._ask_board()
            self._stall_timer.check(running_actors(executor), self._told + self._done)

    def _ask_board(self) -> None:
        """Takes the board's answer to the last question, and asks again; waits for nothing."""
        if self._asked is not None and not ray.wait([self._asked], timeout=0)[0]:
            return
        with contextlib.suppress(ray.exceptions.RayError):  # it died, and is started again
            if self._asked is not None:
                self._told = ray.get(self._asked)
        self._asked = self._board.told.remote()

    def _shards_in_work(self) -> str:
        with contextlib.suppress(ray.exceptions.RayError):
            shards = ray.get(self._board.shards.remote(), timeout=_BOARD_TIMEOUT_S)
            return f"; in work: shard {', '.join(map(str, shards[:10]))}" if shards else ""
        return ""


class WatchCallback(ExecutionCallback):
    """What Ray Data makes and calls for each wave; it travels to the actors by name alone."""

    def __init__(self) -> None:
        self._watchdog, StallWatchdog._ours = StallWatchdog._ours, None

    def on_execution_step(self, executor: Any) -> None:
        if self._watchdog is not None:
            self._watchdog.look(executor)


def running_actors(executor: Any) -> int:
    """Actors of the wave that are ready; those that wait for a node or load are not."""
    operators = (each for each in executor._topology if hasattr(each, "get_actor_info"))
    return sum(each.get_actor_info().running for each in operators)
