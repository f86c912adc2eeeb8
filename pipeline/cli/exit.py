"""How a job ends: one last line for who reads logs, and an exit code, whatever happened."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any, NoReturn, TypeVar

from pipeline.cli.sanitize import Formatter, in_one_line, json_text
from pipeline.text import one_line

T = TypeVar("T")


def run_job(
    job: str, work: Callable[[], str], *, expected: tuple[type[Exception], ...], interrupted: str
) -> int:
    """Does `work`, whose result is the last line, prints that, and gives the exit code: 0.

    It is 1 where one of `expected` is raised, where the job is interrupted (the last line then says
    `interrupted`), and for a bug; 2 for any other ValueError: arguments that cannot be right.
    """
    _warnings_to_stderr()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` is an interruption
    try:
        said = work()
    except expected as error:
        return failed(job, 1, error)
    except ValueError as error:
        return failed(job, 2, error)
    except KeyboardInterrupt:
        return failed(job, 1, interrupted)
    except Exception as error:  # a bug too ends in a line that says so
        logging.exception("this should not happen")
        return failed(job, 1, f"{type(error).__name__}: {error}")
    print(said)
    return 0


def run_interactive(
    arguments: Callable[[], T], work: Callable[[T], None], *, expected: tuple[type[Exception], ...]
) -> int:
    """Does the `work` of a job that people ask and wait for; its exit code.

    What goes wrong is one line on stderr: 2 where `arguments` raises ValueError, 1 where the work
    raises one of `expected` or is interrupted. Anything else is a bug, and is raised.
    """
    _warnings_to_stderr()
    try:
        given = arguments()
    except ValueError as error:
        return _complain(2, in_one_line(error))
    try:
        work(given)
    except expected as error:
        return _complain(1, in_one_line(error))
    except KeyboardInterrupt:
        return _complain(1, "interrupted")
    return 0


def _warnings_to_stderr() -> None:
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[to_stderr], level=logging.WARNING)


def _complain(code: int, line: str) -> int:
    print(line, file=sys.stderr)
    return code


def hard_exit(code: int) -> NoReturn:
    """Ends the process with `code` once Python has tidied up, without native destructors.

    Ray's threads live on while those run, and now and then one crashes in what is gone: a job
    that had finished then looked as if it had been killed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def discard_output(file: IO[Any]) -> None:
    """Lets what is written or flushed there from now on go nowhere: a pipe may have lost its
    reader, or be full for good."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


def last_line(words: str, facts: Mapping[str, object]) -> str:
    """`words` and the facts; a value that is more than a word is in double quotes, as in JSON."""
    return " ".join([words, *(f"{name}={_quoted(value)}" for name, value in facts.items())])


def failed(job: str, code: int, error: object) -> int:
    """Prints how `job` ended with exit code `code`, and gives that code back."""
    reason = one_line(error)
    print(last_line(f"{job} failed", {"exit": code, "reason": reason}), flush=True)
    return code


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not set(text) & set(" \"'\\=")
    return text if plain else json_text(text)
