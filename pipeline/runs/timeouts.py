"""How long a run waits: for processes to start long, for a sign of life from them less long.

Waiting for a cluster that grows is no failure, and is said every so often. Processes that run
while nothing moves are one. The clock is given, so that both can be worked by hand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import ray

from pipeline.runs.ray_connection import RunStoppedError

SAY_EVERY_S = 30.0

logger = logging.getLogger(__name__)


class Patience:
    """Is shown again and again how many processes run, and how much has moved since the start.

    The processes have `cpus` and `gpus` each. `nothing` names what did not move, and `stuck` says
    what is known of it.
    """

    def __init__(
        self,
        *,
        cpus: int,
        gpus: float,
        start_timeout_s: float,
        stall_timeout_s: float,
        nothing: str = "no photo got through",
        stuck: Callable[[], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cpus = cpus
        self._gpus = gpus
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._nothing = nothing
        self._stuck = stuck
        self._clock = clock
        self._seen = (0, 0)
        self._since = self._said = clock()

    def look(self, running: int, moved: int = 0) -> None:
        """Raises RunStoppedError where it took too long."""
        now = self._clock()
        seen = (running, moved if running else 0)
        if seen != self._seen:
            self._seen = seen
            self._since = self._said = now
        elif running:
            self._check_stall(now - self._since)
        else:
            self._check_wait(now)

    def _check_stall(self, seconds: float) -> None:
        if seconds >= self._stall_timeout_s:
            raise RunStoppedError(
                f"nothing moves: {self._seen[0]} processes run, and for {seconds:.0f} s "
                f"(--stall-timeout) {self._nothing}{self._stuck()}"
            )

    def _check_wait(self, now: float) -> None:
        seconds = now - self._since
        if seconds >= self._start_timeout_s:
            raise RunStoppedError(
                f"{self._waiting()}: {seconds:.0f} s were in vain (--start-timeout); "
                "the same command continues once the cluster has one"
            )
        if now - self._said >= SAY_EVERY_S:
            self._said = now
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
            return f"waiting for a process to start: a node with {need} is there, busy or loading"
        return f"waiting for a node with {need}"


def _fits(node: dict[str, float], cpus: int, gpus: float) -> bool:
    return node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus
