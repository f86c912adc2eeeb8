"""Uniform exit handling of the jobs: a final machine-readable line and an exit code."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from pipeline.cli.interrupts import end_if_stuck, own_temporary_folder, raise_on_signals
from pipeline.cli.sanitize import Formatter, in_one_line, json_text
from pipeline.text import one_line

T = TypeVar("T")

_MAX_REASON = 2000
"""Characters: messages end with the way out, which long URIs must not push off the line."""


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
    arrived = raise_on_signals(
        on_signal, signal.SIGINT, signal.SIGTERM
    )  # `ray job stop` sends SIGTERM
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
    print_line(line)
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
    arrived = raise_on_signals(on_signal, signal.SIGINT)
    with end_if_stuck(), own_temporary_folder():
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
        with contextlib.suppress(OSError):  # the reader is gone, or the disk is full
            stream.flush()
    os._exit(code)


def print_line(line: str) -> None:
    """Print at once; a standard output that cannot be written neither ends nor fails a job."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def last_line(words: str, facts: Mapping[str, object]) -> str:
    """Return `words` followed by `key=value` pairs, values of several words quoted as in JSON."""
    return " ".join([words, *(f"{name}={_quoted(value)}" for name, value in facts.items())])


def failed(job: str, code: int, error: object) -> int:
    """Print the last line of a job that failed, and return its exit code."""
    reason = one_line(error, _MAX_REASON)
    print_line(last_line(f"{job} failed", {"exit": code, "reason": reason}))
    return code


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not set(text) & set(" \"'\\=")
    return text if plain else json_text(text)
