"""The Ray that a run uses: the cluster at RAY_ADDRESS, or a local one that it starts."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.runs import ray_compat

_CONNECT_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class RunStoppedError(RuntimeError):
    """The run cannot continue now; what is done is kept, and the same command resumes it."""


def has_cluster() -> bool:
    """Return whether there is a cluster to connect to, rather than a local Ray to start."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect(*, workers: int, cpus: int, gpus: float, quiet: bool = False) -> None:
    """Connect to the Ray at RAY_ADDRESS, or start a local one for `workers` of `cpus` each.

    Unless `quiet`, the workers' output is printed here, and a warning is logged if no node can hold
    a worker. Raises RunStoppedError if Ray cannot be reached, or does not start.
    """
    if ray.is_initialized():
        return
    sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # one CPU more for Ray's own tasks
        _init(cpus=workers * cpus + 1, quiet=quiet)
    except ConnectionError as error:
        raise RunStoppedError(f"cannot reach Ray at RAY_ADDRESS: {error}") from error
    except Exception as error:
        if ray_compat.STARTUP_TIMEOUT not in str(error):
            raise
        raise RunStoppedError(
            "Ray did not start on this machine within 30 s; it may be busy: try again later"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm)  # Ray's handler ends the process silently
    if not quiet:
        _warn_if_nothing_fits(cpus, gpus)


@contextmanager
def disconnect_on_exit() -> Iterator[None]:
    """Shut down, after the block, a Ray that was connected or started in it.

    Then Ray prints nothing more. After an interrupt this is skipped: it may take seconds.
    """
    is_ours = not ray.is_initialized()
    try:
        yield
    except KeyboardInterrupt:
        is_ours = False
        raise
    finally:
        if is_ours and ray.is_initialized():
            with contextlib.suppress(KeyboardInterrupt):  # the results are complete
                ray.shutdown()


def _init(cpus: int, quiet: bool) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": not quiet}
    if has_cluster():
        _check_reachable(os.environ["RAY_ADDRESS"])
        ray.init(**options)
        return
    with ray_compat.loopback_only():
        ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            **options,
        )


def _check_reachable(address: str) -> None:
    """Raise ConnectionError if nothing listens at the address: Ray would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConnectionError(f"{address}: {error}") from error


def _warn_if_nothing_fits(cpus: int, gpus: float) -> None:
    nodes = [each["Resources"] for each in ray.nodes()]  # type: ignore[no-untyped-call]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        logger.warning(
            "no node has %d CPUs and %g GPUs for a worker; waiting for the cluster to scale up",
            cpus,
            gpus,
        )


def worker_slots(cpus: int, gpus: float) -> int:
    """Return how many workers of this size fit on the existing nodes if nothing else runs there."""
    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]  # type: ignore[no-untyped-call]
    return sum(
        int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else math.inf))
        for node in nodes
    )
