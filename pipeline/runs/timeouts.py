"""The two timeouts of a run: for its first process to start, and for progress after that.

Waiting for a cluster that scales up is not a failure, and is logged every `LOG_EVERY_S`. Processes
that run without any progress are a failure.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import ray

from pipeline.runs.ray_connection import RunStoppedError

LOG_EVERY_S = 30.0

logger = logging.getLogger(__name__)


class StallTimer:
    """A timer that stops a run if it waits too long for processes, or if they make no progress.

    The processes need `cpus` and `gpus` each. `missing` says what did not happen during a stall,
    and `details()` what is known about it. `clock` returns seconds.
    """

    def __init__(
        self,
        *,
        cpus: int,
        gpus: float,
        start_timeout_s: float,
        stall_timeout_s: float,
        missing: str = "no image was completed",
        details: Callable[[], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cpus = cpus
        self._gpus = gpus
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._missing = missing
        self._details = details
        self._clock = clock
        self._state = (0, 0)  # processes, progress
        self._since = self._logged_at = clock()

    def check(self, running: int, progress: int = 0) -> None:
        """Compare with the last call: `running` processes, and a count that grows with progress.

        Raises RunStoppedError after `start_timeout_s` without a process, or `stall_timeout_s`
        without progress.
        """
        now = self._clock()
        state = (running, progress if running else 0)
        if state != self._state:
            self._state = state
            self._since = self._logged_at = now
        elif running:
            self._check_stall(now - self._since)
        else:
            self._check_start(now)

    def _check_stall(self, seconds: float) -> None:
        if seconds >= self._stall_timeout_s:
            raise RunStoppedError(
                f"the run stalled: {self._state[0]} processes are running, but {self._missing} "
                f"for {seconds:.0f} s (--stall-timeout){self._details()}"
            )

    def _check_start(self, now: float) -> None:
        seconds = now - self._since
        if seconds >= self._start_timeout_s:
            raise RunStoppedError(
                f"gave up {self._waiting()} after {seconds:.0f} s (--start-timeout); "
                "run the same command again once the cluster has one"
            )
        if now - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            logger.warning(
                "%s, %.0f s so far (--start-timeout %g)",
                self._waiting(),
                seconds,
                self._start_timeout_s,
            )

    def _waiting(self) -> str:
        need = f"{self._cpus} CPUs" + (f" and {self._gpus:g} GPUs" if self._gpus else "")
        nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]  # type: ignore[no-untyped-call]
        if any(_fits(node, self._cpus, self._gpus) for node in nodes):
            return f"waiting for a process to start: a node with {need} exists, busy or loading"
        return f"waiting for a node with {need}"


def _fits(node: dict[str, float], cpus: int, gpus: float) -> bool:
    return node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus
