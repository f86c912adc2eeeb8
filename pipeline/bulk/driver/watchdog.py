"""Stall detection for one batch of shards, inside Ray Data's own execution loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from pipeline.runs.ray_compat import ExecutionCallback, running_actors
from pipeline.runs.timeouts import StallTimer

_CHECK_EVERY_S = 1.0
_REPLY_TIMEOUT_S = 5.0
_MAX_SHARDS_NAMED = 10


class StallWatchdog:
    """A check, between the steps of an execution, that actors run and make progress.

    `stall_timer` makes the timer from a function that describes a stall.
    """

    _starting: StallWatchdog | None = None  # taken by the callback of the next execution

    def __init__(
        self, stall_timer: Callable[[Callable[[], str]], StallTimer], progress_actor: Any
    ) -> None:
        self._progress_actor = progress_actor
        self._stall_timer = stall_timer(self._shards_in_work)
        self._next = 0.0
        self._pending: Any = None  # a call of the progress actor
        self._reports = self._rows = 0

    def iter_rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """Execute the data set and yield its rows. Raises RunStoppedError if it stalls."""
        StallWatchdog._starting = self
        for row in dataset.iter_rows():
            self._rows += 1
            yield row

    def check(self, executor: Any) -> None:
        """Check the timeouts; called many times a second. What it raises ends the execution."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _CHECK_EVERY_S
            self._poll()
            self._stall_timer.check(running_actors(executor), self._reports + self._rows)

    def _poll(self) -> None:
        """Read the reply to the last call, if there is one, and call again without blocking."""
        if self._pending is not None and not ray.wait([self._pending], timeout=0)[0]:
            return
        with contextlib.suppress(ray.exceptions.RayError):  # the actor is being restarted
            if self._pending is not None:
                self._reports = ray.get(self._pending)
        self._pending = self._progress_actor.reports.remote()

    def _shards_in_work(self) -> str:
        with contextlib.suppress(ray.exceptions.RayError):
            shards = ray.get(self._progress_actor.shards.remote(), timeout=_REPLY_TIMEOUT_S)
            named = ", ".join(map(str, shards[:_MAX_SHARDS_NAMED]))
            return f"; shards in work: {named}" if shards else ""
        return ""


class WatchdogCallback(ExecutionCallback):
    """The callback that passes the steps of an execution to the `StallWatchdog` that started it.

    Ray Data makes an instance per execution, in the driver, and pickles the class by name.
    """

    def __init__(self) -> None:
        self._watchdog, StallWatchdog._starting = StallWatchdog._starting, None

    def on_execution_step(self, executor: Any) -> None:
        if self._watchdog is not None:
            self._watchdog.check(executor)
