"""The Ray that a run uses: the one of RAY_ADDRESS, or one of its own on this machine."""

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
from ray._private import ray_constants

_REACHABLE_S = 5.0

logger = logging.getLogger(__name__)


class RunStoppedError(RuntimeError):
    """The run cannot go on now; what is done stays, and the same command continues it."""


def has_cluster() -> bool:
    """Whether there is a Ray to join, rather than one to start."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect(*, workers: int, cpus: int, gpus: float, quiet: bool = False) -> None:
    """Joins the Ray of RAY_ADDRESS, or starts one here that holds `workers` of `cpus` each.

    What its workers print is printed here too, unless `quiet`, and that it has no room for them.

    Raises RunStoppedError where none answers, or none starts.
    """
    if ray.is_initialized():
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        # the workers, and one that someone may add by hand; Ray's own tasks need one more
        _init(wanted=workers * cpus + 1, quiet=quiet)
    except ConnectionError as error:
        raise RunStoppedError(f"no Ray answers at RAY_ADDRESS: {error}") from error
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type of its own for it
            raise
        raise RunStoppedError(
            "Ray did not start on this machine within 30 s: is it busy with something else?"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # Ray's own ends the process without a word
    if not quiet:
        _warn_where_nothing_fits(cpus, gpus)


@contextmanager
def disconnect_on_exit() -> Iterator[None]:
    """A Ray that the block joins or starts is left at its end: it prints nothing afterwards.

    Not where the block is interrupted: who does that may wait for a few seconds only.
    """
    mine = not ray.is_initialized()
    try:
        yield
    except KeyboardInterrupt:
        mine = False
        raise
    finally:
        if mine and ray.is_initialized():
            with contextlib.suppress(KeyboardInterrupt):  # what is done is done
                ray.shutdown()


def _init(wanted: int, quiet: bool) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": not quiet}
    if has_cluster():
        _check_reachable(os.environ["RAY_ADDRESS"])
        ray.init(**options)
        return
    with _loopback():
        ray.init(
            address="local",
            num_cpus=max(wanted, os.cpu_count() or 1),
            include_dashboard=False,
            **options,
        )


@contextmanager
def _loopback() -> Iterator[None]:
    """A Ray that is started here listens to this machine alone, not on all of its addresses.

    Ray does so by itself where it can have no cluster (Windows, macOS), and has no argument for
    it: it takes 127.0.0.1 for a wish to be reached from elsewhere.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_reachable(address: str) -> None:
    """Raises ConnectionError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_REACHABLE_S).close()
        except OSError as error:
            raise ConnectionError(f"{address}: {error}") from error


def _warn_where_nothing_fits(cpus: int, gpus: float) -> None:
    nodes = [each["Resources"] for each in ray.nodes()]  # type: ignore[no-untyped-call]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        logger.warning(
            "no node has %d CPUs and %g GPUs for a worker; waiting for the cluster to grow",
            cpus,
            gpus,
        )


def worker_slots(cpus: int, gpus: float) -> int:
    """How many workers of that size the nodes that are there hold, were nothing else on them."""
    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]  # type: ignore[no-untyped-call]
    return sum(
        int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else math.inf))
        for node in nodes
    )
