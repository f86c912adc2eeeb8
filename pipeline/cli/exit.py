"""Uniform exit handling of the jobs: one last line, an exit code, and a prompt end on Ctrl-C."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, TypeVar

from pipeline.cli.sanitize import Formatter, in_one_line, json_text
from pipeline.text import one_line

T = TypeVar("T")

_GRACE_S = 1.0

unfinished: list[str] = []
"""Files and folders that an interactive job deletes where Ctrl-C ends it in the middle of them."""


def run_job(
    job: str,
    work: Callable[[], str],
    *,
    expected: tuple[type[Exception], ...],
    interrupted: str,
    on_signal: Callable[[], None] = lambda: None,
) -> int:
    """Run a job, print its last line, and return its exit code.

    `work` returns the last line of a success (exit code 0). The exit code is 1 if `work` raises one
    of `expected`, if the job is interrupted (the last line then says `interrupted`), and for a bug;
    it is 2 for any other ValueError: invalid arguments. A signal calls `on_signal` first.
    """
    _warnings_to_stderr()
    arrived = _raise_on(on_signal, signal.SIGINT, signal.SIGTERM)  # `ray job stop` sends SIGTERM
    try:
        line = work()
    except KeyboardInterrupt:
        return failed(job, 1, interrupted)
    except Exception as error:
        if arrived:
            return failed(job, 1, interrupted)
        if isinstance(error, expected):
            return failed(job, 1, error)
        if isinstance(error, ValueError):
            return failed(job, 2, error)
        logging.exception("unexpected error (please report)")
        return failed(job, 1, f"{type(error).__name__}: {error}")
    print(line)
    return 0


def run_interactive(
    arguments: Callable[[], T],
    work: Callable[[T], None],
    *,
    expected: tuple[type[Exception], ...],
    on_signal: Callable[[], None] = lambda: None,
) -> int:
    """Run a job that its user waits for, and return its exit code.

    An error is one line on stderr: exit code 2 if `arguments` raises ValueError, 1 if `work` raises
    one of `expected` or is interrupted. Any other exception is a bug and is raised.

    Ctrl-C ends the job within about a second, whatever it does, and removes its temporary files.
    """
    _warnings_to_stderr()
    try:
        given = arguments()
    except ValueError as error:
        return _complain(2, in_one_line(error))
    arrived = _raise_on(on_signal, signal.SIGINT)
    with _end_if_stuck(), _own_temporary_folder():
        try:
            work(given)
        except KeyboardInterrupt:
            return _complain(1, "interrupted")
        except Exception as error:
            if arrived:
                return _complain(1, "interrupted")
            if isinstance(error, expected):
                return _complain(1, in_one_line(error))
            raise
    return 0


def _warnings_to_stderr() -> None:
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[to_stderr], level=logging.WARNING)


def _raise_on(on_signal: Callable[[], None], *signals: int) -> list[int]:
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
def _end_if_stuck() -> Iterator[None]:
    """End the process shortly after Ctrl-C if the main thread does not get out of the block.

    Python raises KeyboardInterrupt between two of its own instructions only, so not while DuckDB
    works; and cleaning up after it may block on a pipe that nobody reads.
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
            os._exit(_complain(1, "interrupted"))

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
def _own_temporary_folder() -> Iterator[None]:
    """Give the job a temporary folder of its own, into which DuckDB spills."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="deeplab-", ignore_cleanup_errors=True) as folder:
        unfinished.append(folder)
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def _complain(code: int, line: str) -> int:
    print(line, file=sys.stderr, flush=True)
    return code


def hard_exit(code: int) -> NoReturn:
    """End the process with `code` once Python has tidied up, without running native destructors.

    Ray's threads live on while those run, and sometimes one crashes in memory that is gone: a
    finished job then looked as if it had crashed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # the reader is gone
            stream.flush()
    os._exit(code)


def last_line(words: str, facts: Mapping[str, object]) -> str:
    """Return `words` followed by `key=value` pairs, values of several words quoted as in JSON."""
    return " ".join([words, *(f"{name}={_quoted(value)}" for name, value in facts.items())])


def failed(job: str, code: int, error: object) -> int:
    """Print the last line of a job that failed, and return its exit code."""
    reason = one_line(error)
    print(last_line(f"{job} failed", {"exit": code, "reason": reason}), flush=True)
    return code


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not set(text) & set(" \"'\\=")
    return text if plain else json_text(text)
