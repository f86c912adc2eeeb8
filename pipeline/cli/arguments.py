"""Command-line parsing: flags become a settings dataclass, and an error is one line."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

import tyro

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

RENAMED_FLAGS = {
    "--max-wait": "--start-timeout",
    "--max-stall": "--stall-timeout",
    "--model-changed": "--on-model-change",
    "--photos": "--images",
}
"""Former names of flags, which are still accepted, with a warning."""

logger = logging.getLogger(__name__)


class ArgumentsError(ValueError):
    """The command line is invalid; the message is one line."""


def parse(kind: type[T], argv: Sequence[str] | None, *, description: str | None) -> T:
    """Return a `kind` made from the command line `argv` (by default, that of the process).

    The flags of nested settings have no prefix. Raises ArgumentsError; `--help` prints the help and
    raises SystemExit(0).
    """
    given = sys.argv[1:] if argv is None else argv
    arguments = [_current(argument, kind) for argument in given]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                args=arguments,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as ended:
        if ended.code in (0, None):
            raise
        program = f"{sys.argv[0]} " if argv is None else ""
        raise ArgumentsError(f"{_error_in(errors.getvalue())}; see {program}--help") from None


def _current(argument: str, kind: type[DataclassInstance]) -> str:
    """Return the argument with its flag under today's name."""
    name, equals, value = argument.partition("=")
    flag = RENAMED_FLAGS.get(name.replace("_", "-"))
    known = {f"--{field.name.replace('_', '-')}" for field in fields(kind)}
    if flag is None or flag not in known:
        return argument
    logger.warning("%s is now called %s; the old name still works", name, flag)
    return f"{flag}{equals}{value}"


def _error_in(box: str) -> str:
    """Return the error in a box that tyro drew, without frame, title and the help of the flags.

    The frame is made of box-drawing characters where the terminal can show them, and of dashes and
    spaces elsewhere; the error ends at the first rule inside the box.
    """
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    is_rule = [re.match(r"[─-]{5}", line) is not None for line in lines]
    first = 2 if len(lines) > 1 and is_rule[1] else 1
    last = is_rule.index(True, first) if True in is_rule[first:] else len(lines)
    error = lines[first:last]
    if error and error[0].startswith("Missing from"):
        names = [line.split()[0] for line in error if line.startswith("--") or line.isupper()]
        return f"missing: {', '.join(names)}"
    return re.sub(r"^Error parsing \w+: ", "", " ".join(" ".join(error).split()))
