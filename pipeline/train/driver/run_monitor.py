"""Monitoring of a training run: passes its status on, and interrupts a run that cannot continue."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import ray

from pipeline.runs.ray_connection import RunStoppedError
from pipeline.runs.timeouts import StallTimer
from pipeline.train.driver.status import Status

POLL_EVERY_S = 2.0

OnStatus = Callable[[Status], None]
"""Called with the run's status every few seconds."""

logger = logging.getLogger(__name__)


class RunMonitor:
    """A thread that polls the status actor within a `with` block.

    Interrupts the main thread, with the reason in `stopped`, if `lost` is set, because another
    driver has taken over the run, or if `stall_timer` expires: Ray notices workers that crash, but
    not those that hang.
    """

    def __init__(
        self, actor: Any, on_status: OnStatus, lost: threading.Event, stall_timer: StallTimer
    ) -> None:
        self.stopped = ""
        self._actor, self._on_status, self._lost = actor, on_status, lost
        self._stall_timer = stall_timer
        self._display_failed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="run-monitor", daemon=True)

    def __enter__(self) -> RunMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._ended.wait(POLL_EVERY_S):
            try:
                self._check()
            except RunStoppedError as error:
                self.stopped = str(error)
            if self._lost.is_set():
                self.stopped = "another driver took over the run"
            if self.stopped:
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGINT)  # interrupts whatever it waits for
                return
        with contextlib.suppress(RunStoppedError):  # the run has ended
            self._check()

    def _check(self) -> None:
        try:
            status: Status = ray.get(self._actor.status.remote(), timeout=POLL_EVERY_S)
            self._display(status)
            self._stall_timer.check(status.workers, status.heartbeats)
        except ray.exceptions.RayError:  # the next poll may succeed
            return

    def _display(self, status: Status) -> None:
        """Call the observer; its errors, such as a closed terminal, do not stop the monitoring."""
        try:
            self._on_status(status)
        except Exception as error:
            if not self._display_failed:
                logger.warning("cannot display the progress: %s", error)
            self._display_failed = True
