"""One driver per run: a stored object with a heartbeat that names the driver working on it.

The lease avoids duplicate work; put-if-absent keeps the results correct without it. Clocks of
different machines are never compared: a lease is stale if its holder is known to have exited, or if
it does not change while another driver watches it.
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
    """The lease of one run, from `acquire` to `release`; `lost` is set if another driver took it.

    On a local file system, `release` also deletes folders that become empty, below `within`.
    """

    def __init__(self, uri: str, run_id: str, *, within: str | None = None) -> None:
        self._uri = uri
        self._run_id = run_id
        self._within = within
        self._token = secrets.token_hex(8)
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.lost = threading.Event()

    def acquire(self) -> None:
        """Take the lease, also from a holder that has exited. Raises HeldError, StorageError."""
        if not storage.create(self._uri, self._content()):
            self._take_over()
        self._thread.start()

    def release(self) -> None:
        """Stop the heartbeat, and delete the lease unless another driver has it."""
        self._released.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(storage.StorageError):
            if _read(self._uri).get("token") == self._token:
                storage.delete([self._uri], within=self._within)

    def _take_over(self) -> None:
        if live := find_live([self._uri], self._run_id):
            raise HeldError(describe_holder(live[self._uri], self._run_id))
        storage.write(self._uri, self._content())
        time.sleep(0.5)  # if several drivers take over at once, the last writer gets it
        if _read(self._uri).get("token") != self._token:
            raise HeldError(f"another driver has taken over run {self._run_id}")

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            try:
                if _read(self._uri).get("token", self._token) != self._token:
                    self.lost.set()
                    return
                storage.write(self._uri, self._content())
            except storage.StorageError as error:
                logger.warning("cannot renew the lease: %s", error)

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
    """Hold the run's lease while the block runs. Raises HeldError, StorageError."""
    lease = Lease(uri, run_id, within=within)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def find_live(uris: Iterable[str], run_id: str) -> dict[str, dict[str, Any]]:
    """Return the leases that are held, with their content.

    A missing lease, and one whose holder has exited on this machine, is known to be free at once.
    The others are watched together for a change, for at most `STALE_S`: a live holder writes a
    heartbeat in that time. `run_id` is the run of leases that do not name one. Raises StorageError.
    """
    live: dict[str, dict[str, Any]] = {}
    unknown = {uri: holder for uri in uris if not _has_exited(holder := _read(uri))}
    for holder in unknown.values():
        description = describe_holder(holder, run_id)
        logger.warning("%s; watching it for %g s for a heartbeat", description, STALE_S)
    deadline = time.monotonic() + STALE_S
    while unknown and time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 10)
        for uri, holder in list(unknown.items()):
            if (now := _read(uri)) != holder:
                del unknown[uri]
                if now:  # else it was released
                    live[uri] = now
    return live


def describe_holder(holder: dict[str, Any], run_id: str) -> str:
    """Return a message about the holder of a lease that `run_id` needs: host, process and run."""
    run = holder.get("run_id", run_id)
    since = f" since {holder['since']}" if "since" in holder else ""
    held = f"run {run} is being worked on by {holder.get('host')}:{holder.get('pid')}{since}"
    other = f", and run {run_id} would do the same work" if run != run_id else ""
    return held + other


def clear_stale(uri: str, *, within: str | None = None) -> None:
    """Delete the lease of a finished run if its holder has exited, and storage allows it."""
    with contextlib.suppress(storage.StorageError):
        holder = _read(uri)
        if holder and _has_exited(holder):
            storage.delete([uri], within=within)


def _read(uri: str) -> dict[str, Any]:
    """Return the lease's content: empty if it is missing, an unknown holder if it is corrupt."""
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
    """Return an id of the scope in which process ids are unique: this boot and PID namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def _has_exited(holder: dict[str, Any]) -> bool:
    """Return True if there is no holder, or it ran on this host and boot and has exited."""
    if holder.get("boot") != _boot() or holder.get("host") != socket.gethostname():
        return not holder
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
