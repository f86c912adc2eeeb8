"""One driver a run: an object with a heartbeat that says who works on it.

The lease saves work; put-if-absent keeps the results correct without it. Clocks of different
machines are never compared: a lease is stale when its holder is known to be dead, or when it does
not change while the one who wants it watches.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from pipeline.data import storage

HEARTBEAT_S = 10.0
STALE_S = 35.0

logger = logging.getLogger(__name__)


class HeldError(RuntimeError):
    """Another driver works on the run."""


class Lease:
    """The lease of one run, held from `acquire` to `release`; `lost` is set if another took it."""

    def __init__(self, uri: str, run_id: str, *, within: str | None = None) -> None:
        self._uri = uri
        self._run_id = run_id
        self._within = within  # local folders that become empty with the lease go, up to this one
        self._token = secrets.token_hex(8)
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.lost = threading.Event()

    def acquire(self) -> None:
        """Takes the lease, from a holder that died if need be. Raises HeldError, StorageError."""
        if not storage.create(self._uri, self._content()):
            self._take_over()
        self._thread.start()

    def release(self) -> None:
        """Ends the heartbeat, and gives the lease back unless another has it."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(storage.StorageError):
            if _read(self._uri).get("token") == self._token:
                storage.delete([self._uri], within=self._within)

    def _take_over(self) -> None:
        if living := find_live([self._uri], self._run_id):
            raise HeldError(describe_holder(living[self._uri], self._run_id))
        storage.write(self._uri, self._content())
        time.sleep(0.5)  # of several that take over at once, the last writer has it
        if _read(self._uri).get("token") != self._token:
            raise HeldError(f"run {self._run_id} was taken over by another driver")

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                if _read(self._uri).get("token", self._token) != self._token:
                    self.lost.set()
                    return
                storage.write(self._uri, self._content())
            except storage.StorageError as error:
                logger.warning("the lease could not be renewed: %s", error)

    def _content(self) -> bytes:
        return json.dumps(
            {
                "run_id": self._run_id,
                "token": self._token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "boot": _boot(),
                "since": self._since,
                "heartbeat": datetime.now(UTC).isoformat(),
            }
        ).encode()


@contextlib.contextmanager
def hold(uri: str, run_id: str, *, within: str | None = None) -> Iterator[Lease]:
    """The run's lease, while the block runs."""
    lease = Lease(uri, run_id, within=within)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def find_live(uris: Iterable[str], run_id: str) -> dict[str, dict[str, Any]]:
    """Those of the leases that somebody holds, with what they say; the others are nobody's.

    One that is not there, or whose holder is known to be dead, is known at once. The others are
    watched together, for `STALE_S` at most: a living holder writes another heartbeat meanwhile.
    `run_id` is the run of which leases that do not say theirs are. Raises StorageError.
    """
    living: dict[str, dict[str, Any]] = {}
    unknown = {uri: holder for uri in uris if not _is_dead(holder := _read(uri))}
    for holder in unknown.values():
        hold = describe_holder(holder, run_id)
        logger.warning("%s; watching for %g s whether it still lives", hold, STALE_S)
    deadline = time.monotonic() + STALE_S
    while unknown and time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 10)
        for uri, holder in list(unknown.items()):
            if (now := _read(uri)) != holder:
                del unknown[uri]
                if now:  # else it was given back
                    living[uri] = now
    return living


def describe_holder(holder: dict[str, Any], run_id: str) -> str:
    """Who holds a lease that `run_id` wants, since when, and for which run where it is another."""
    run = holder.get("run_id", run_id)
    since = f" since {holder['since']}" if "since" in holder else ""
    hold = f"run {run} is being worked on by {holder.get('host')}:{holder.get('pid')}{since}"
    other = f", and run {run_id} would do the same work" if run != run_id else ""
    return hold + other


def clear_stale(uri: str, *, within: str | None = None) -> None:
    """Deletes the lease of a holder that is known to be dead: a run that is finished needs none.

    Storage that refuses keeps it.
    """
    with contextlib.suppress(storage.StorageError):
        holder = _read(uri)
        if holder and _is_dead(holder):
            storage.delete([uri], within=within)


def _read(uri: str) -> dict[str, Any]:
    """What the lease says; nothing where there is none, a holder unknown where it is broken."""
    try:
        content = json.loads(storage.read(uri))
    except storage.StorageError as error:
        if error.kind == "vanished":
            return {}
        raise
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {"token": "broken"}


def _boot() -> str:
    """Where a process id means one process: this container, this machine since it was started."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine and runs no more; of others nothing is known."""
    if holder.get("boot") != _boot() or holder.get("host") != socket.gethostname():
        return not holder
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
