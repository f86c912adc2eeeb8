"""A Ray of several nodes on this machine, whose processes are hooked as those of a run are."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

_TRIES = 4  # Ray gives its processes half a minute to come up: too little on a crowded machine


class Nodes:
    """A head without CPUs, and what is added; `variables` are the environment of all."""

    def __init__(self, variables: dict[str, str]) -> None:
        # Ray is nice to others by default, which on a crowded machine means that nothing moves
        self._variables = {**variables, "RAY_worker_niceness": "0"}
        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster: Any = self._tried(lambda: Cluster(True, head_node_args=head))

    @property
    def address(self) -> str:
        """For $RAY_ADDRESS."""
        address: str = self._cluster.address
        return address

    def add(self, *, cpus: int) -> None:
        """Adds a node."""
        self._tried(lambda: self._cluster.add_node(num_cpus=cpus))

    def close(self) -> None:
        """Ends all nodes."""
        self._cluster.shutdown()

    def _tried(self, start: Callable[[], Any]) -> Any:
        """What `start()` returns; what a failed try has left running is ended."""
        before = _children()
        for left in reversed(range(_TRIES)):
            try:
                with self._environment():
                    return start()
            except Exception:  # plain ones, of Ray
                for pid in _children() - before:
                    os.kill(pid, signal.SIGKILL)
                if not left:
                    raise
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._variables.items():
                patch.setenv(name, value)
            yield


def _children() -> set[int]:
    """Ids of the processes that this one has started and not waited for."""
    listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for each in listed for pid in each.read_text().split()}
