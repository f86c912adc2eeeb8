"""A Ray cluster of several nodes on this machine, whose processes load the fault hooks."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

_TRIES = 4  # Ray's 30 s for its processes to start are too short on a busy machine


class Nodes:
    """A head node without CPUs, and the nodes added; `variables` are set in all their processes."""

    def __init__(self, variables: dict[str, str]) -> None:
        # by default Ray gives its workers a low priority: on a busy machine they make no progress
        self._variables = {**variables, "RAY_worker_niceness": "0"}
        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster: Any = self._tried(lambda: Cluster(True, head_node_args=head))

    @property
    def address(self) -> str:
        """The value for $RAY_ADDRESS."""
        address: str = self._cluster.address
        return address

    def add(self, *, cpus: int) -> None:
        """Add a node."""
        self._tried(lambda: self._cluster.add_node(num_cpus=cpus))

    def close(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()

    def _tried(self, start: Callable[[], Any]) -> Any:
        """Return the result of `start()`, retried on failure after killing the processes left."""
        before = _children()
        for left in reversed(range(_TRIES)):
            try:
                with self._environment():
                    return start()
            except Exception:  # Ray raises plain exceptions here
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
    """Return the ids of this process's children."""
    listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for each in listed for pid in each.read_text().split()}
