"""Ctrl-C and SIGTERM: a prompt end of a job, also while native code runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

_GRACE_S = 1.0

unfinished: list[str] = []
"""Files and folders that an interactive job deletes where Ctrl-C ends it in the middle of them."""


def raise_on_signals(on_signal: Callable[[], None], *signals: int) -> list[int]:
    """Let these signals raise KeyboardInterrupt; the list returned holds those that have arrived.

    DuckDB raises an error of its own in place of KeyboardInterrupt: the list tells them apart.
    """
    arrived: list[int] = []

    def interrupt(number: int, _: object) -> None:
        arrived.append(number)
        on_signal()
        raise KeyboardInterrupt

    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in a shell's background job
            signal.signal(number, interrupt)
    return arrived


@contextlib.contextmanager
def end_if_stuck() -> Iterator[None]:
    """End the process shortly after Ctrl-C if the main thread does not get out of the block.

    Python raises KeyboardInterrupt between two of its own instructions only, so not while DuckDB
    works; and cleaning up after it may block on a pipe without a reader.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ending = threading.Lock()  # taken by the thread that prints and ends

    def watch() -> None:
        with open(reading, "rb", buffering=0) as wakeups:
            if not wakeups.read(1):
                return
        time.sleep(_GRACE_S)
        if ending.acquire(blocking=False):
            for path in unfinished:
                _delete(path)
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(1)

    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="ctrl-c", daemon=True).start()
    try:
        yield
    finally:
        ending.acquire()
        signal.set_wakeup_fd(before)
        os.close(writing)


def _delete(path: str) -> None:
    """Delete the file, or the folder even while DuckDB's threads write to it."""
    with contextlib.suppress(OSError):
        gone = f"{path}.deleted"
        os.rename(path, gone)
        if os.path.isdir(gone):
            shutil.rmtree(gone, ignore_errors=True)
        else:
            os.unlink(gone)


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Give the job a temporary folder of its own, into which DuckDB spills."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="deeplab-", ignore_cleanup_errors=True) as folder:
        unfinished.append(folder)
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
